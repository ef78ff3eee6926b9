"""Context parallelism: who holds which rows, and how the rows that others need travel. No kernels, no global groups."""

from nsa_cp.context_parallel.agreement import start_agreement
from nsa_cp.context_parallel.differentiable import exchange_halo, gather_rows
from nsa_cp.context_parallel.gather import RowGather, RowPartition, RowReduceScatter, RowRing
from nsa_cp.context_parallel.group import check_group, group_rank, group_size
from nsa_cp.context_parallel.halo import HaloExchange, HaloRows
from nsa_cp.context_parallel.layout import SequenceLayout
from nsa_cp.context_parallel.traffic import Traffic, count_traffic

__all__ = [
    "HaloExchange",
    "HaloRows",
    "RowGather",
    "RowPartition",
    "RowReduceScatter",
    "RowRing",
    "SequenceLayout",
    "Traffic",
    "check_group",
    "count_traffic",
    "exchange_halo",
    "gather_rows",
    "group_rank",
    "group_size",
    "start_agreement",
]
