"""Context parallelism: which rank holds which rows of a sequence, and how rows and gradients travel between ranks.

Knows nothing of attention; uses no kernels and no global process groups. A row is one token's entry in a tensor [tokens, ...].
"""

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
