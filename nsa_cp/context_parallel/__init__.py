"""Context parallelism: who holds which rows, and how the rows that others need travel. No kernels, no global groups."""

from nsa_cp.context_parallel.differentiable import exchange_halo, gather_rows
from nsa_cp.context_parallel.gather import RowGather, RowPartition, RowReduceScatter, RowRing
from nsa_cp.context_parallel.group import agree_once, check_agreement, check_group, group_rank, group_size
from nsa_cp.context_parallel.halo import HaloExchange, HaloRows
from nsa_cp.context_parallel.layout import SequenceLayout

__all__ = [
    "HaloExchange",
    "HaloRows",
    "RowGather",
    "RowPartition",
    "RowReduceScatter",
    "RowRing",
    "SequenceLayout",
    "agree_once",
    "check_agreement",
    "check_group",
    "exchange_halo",
    "gather_rows",
    "group_rank",
    "group_size",
]
