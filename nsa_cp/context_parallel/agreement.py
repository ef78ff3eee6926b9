"""Checks that all ranks make the same call (layout, shapes, settings), so that a mismatch is an error instead of a hang.

Every attention call starts an all-gather of an eight-byte digest per rank between the hosts, over gloo. A rank that sees a call
for the first time waits for the result before it sends anything else; a rank that repeats a call looks at it after queueing
the call's kernels, when it has usually arrived. So no rank waits for its GPU; and since every rank takes part in every call, a
rank that repeats an old call while another makes a new one is found too.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

from nsa_cp.context_parallel.group import group_size
from nsa_cp.context_parallel.layout import SequenceLayout
from nsa_cp.context_parallel.transfer import lost_rank


class Agreement:
    """One comparison between the ranks of a group, under way from construction. Collective.

    Args:
        digest: the number to compare, of at most 63 bits.
        describe: tells what this rank has, for the error message.
        group: the ranks that compare.
    """

    def __init__(self, digest: int, describe: Callable[[], str], group: dist.ProcessGroup) -> None:
        self._describe, self._rank = describe, group.rank()
        self._gathered = [torch.empty(1, dtype=torch.int64) for _ in range(group.size())]
        with _lost_ranks_named():
            self._work = _gather_between_hosts(self._gathered, torch.tensor([digest]), group)

    def confirm(self) -> None:
        """Wait for the other ranks' hosts (not for any GPU) and compare.

        Raises:
            ValueError: on every rank, naming the ranks that differ from rank 0 of the group and what this rank has.
            RuntimeError: a rank died or did not take part within the group's timeout.
        """
        with _lost_ranks_named():
            self._work.wait()
        digests = [int(digest) for digest in self._gathered]
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise ValueError(
                f"context-parallel ranks {differing} differ from rank 0 in layout, shapes, dtype or settings; give every rank of "
                f"the group the same. Rank {self._rank} has: {self._describe()}"
            )


class NoAgreement:
    """Stands in for :class:`Agreement` on a single process, which has nothing to compare."""

    def confirm(self) -> None:
        """Nothing to do."""


def start_agreement(
    confirmed: dict[tuple, int], layout: SequenceLayout, facts: tuple, group: dist.ProcessGroup | None, device: torch.device
) -> Agreement | NoAgreement:
    """Let all ranks of ``group`` compare ``layout`` and ``facts``. Collective.

    Call ``confirm()`` on the result once the call's kernels are queued. What this rank has not met before is confirmed here,
    before anything depends on it; on a CPU, where transfers block the host, everything is.

    Args:
        confirmed: digests of calls that were confirmed, by (group name, facts); the caller keeps this dict with what it caches
            for the layout, and it is added to here.
        facts: what else must be equal on all ranks: the kind of call, shapes, dtypes and settings. Hashable.
        device: where the call computes.

    Raises:
        ValueError, RuntimeError: as :meth:`Agreement.confirm`.
    """
    if group_size(group) == 1:
        return NoAgreement()

    def describe() -> str:
        return f"documents {layout.cu_seqlens}, chunks {layout.chunks}, and {facts}"

    known = (group.group_name, facts) in confirmed
    digest = confirmed[group.group_name, facts] if known else _digest(describe())
    agreement = Agreement(digest, describe, group)
    if not known or device.type == "cpu":
        agreement.confirm()
        confirmed[group.group_name, facts] = digest
    return agreement


def _digest(description: str) -> int:
    return int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")


def connect(group: dist.ProcessGroup) -> None:
    """Make NCCL set up the group's connections. Collective.

    NCCL does so in a group's first call, in which every rank must take part, and a halo exchange may involve only some.
    """
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


# For every group that cannot move host memory itself, a gloo group of the same ranks. Weak keys, so that a gloo group goes with
# its group: one kept until the interpreter ends has threads that may outlive it, and the process aborts.
_gloo: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroupGloo] = weakref.WeakKeyDictionary()
# Groups that need no `connect` any more.
_connected: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
# How many groups of each name there have been: a name may be used again once its group is destroyed.
_named: collections.Counter[str] = collections.Counter()


def _gather_between_hosts(gathered: list[torch.Tensor], mine: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start an all-gather of ``mine`` into ``gathered``, both in host memory. Collective."""
    if group not in _connected:
        _connected.add(group)
        if "cuda:nccl" in dist.get_backend_config(group):
            connect(group)
    if "cpu:" in dist.get_backend_config(group):
        return dist.all_gather(gathered, mine, group=group, async_op=True)
    if group not in _gloo:
        _gloo[group] = _meet(group)
    return _gloo[group].allgather([gathered], [mine])


def _meet(group: dist.ProcessGroup) -> dist.ProcessGroupGloo:
    """A gloo group of the ranks of ``group``. Collective.

    They find each other in the store under the group's name. A name that torch makes up would not do: it counts the groups that a
    process belongs to, and ranks may belong to different numbers of groups.
    """
    _named[group.group_name] += 1
    # The group's own timeout where torch reveals it, else torch's default.
    options = getattr(group._get_backend(torch.device("cuda")), "options", None)
    timeout = getattr(options, "_timeout", None) or dist.default_pg_timeout
    place = f"nsa_cp agreement/{group.group_name}/{_named[group.group_name]}"
    store = dist.PrefixStore(place, dist.distributed_c10d._get_default_store())
    return dist.ProcessGroupGloo(store, group.rank(), group.size(), timeout)


@contextlib.contextmanager
def _lost_ranks_named():  # noqa: ANN202
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"context-parallel ranks could not compare their layouts: {lost_rank(error)}") from error
