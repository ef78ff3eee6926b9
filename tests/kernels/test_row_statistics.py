"""Row statistics as the copy engine fetches them: tiles that begin at multiples of their size, nothing but zeros behind."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")

from nsa_cp.kernels.interval_attention.hopper_backward import pack_statistics  # noqa: E402


@pytest.mark.parametrize("tokens, groups, heads", [(421, 2, 2), (701, 2, 1), (64, 1, 16), (1, 3, 64)])
@pytest.mark.parametrize("tile_rows", [32, 64])
def test_tiles_of_statistics(tokens: int, groups: int, heads: int, tile_rows: int) -> None:
    shift, delta = torch.randn(2, tokens, groups * heads)
    with mock.patch.object(torch, "empty", lambda *size, **options: torch.full(size, float("nan"), **options)):
        stats = pack_statistics(shift, delta, groups, tile_rows)
    assert stats.is_contiguous() and stats.shape[2] % tile_rows == 0
    for part, x in zip(stats, (shift, delta), strict=True):
        for group in range(groups):
            rows = x[:, group * heads : (group + 1) * heads].reshape(-1)
            assert torch.equal(part[group, : rows.numel()], rows)
            assert not part[group, rows.numel() :].any()
