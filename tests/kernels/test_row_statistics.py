"""Row statistics as the copy engine fetches them: tiles that begin at multiples of their size, nothing but zeros behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with Triton from 3.6 on, for Linux")

from nsa_cp.kernels.interval_attention.hopper_backward import group_by_group  # noqa: E402


@pytest.mark.parametrize("tokens, groups, heads", [(421, 2, 2), (701, 2, 1), (64, 2, 16), (1, 3, 64)])
@pytest.mark.parametrize("tile_rows", [32, 64])
def test_tiles_of_several_groups(tokens: int, groups: int, heads: int, tile_rows: int) -> None:
    x = torch.randn(tokens, groups * heads)
    group_rows = -(-tokens * heads // tile_rows) * tile_rows
    flat = group_by_group(x, groups, group_rows)
    assert flat.is_contiguous() and flat.shape == (groups * group_rows,)
    for group, part in enumerate(flat.view(groups, group_rows)):
        rows = x[:, group * heads : (group + 1) * heads].reshape(-1)
        assert torch.equal(part[: rows.numel()], rows)
        assert not part[rows.numel() :].any()


def test_one_group_is_not_copied_where_it_lies_right() -> None:
    around = torch.randn(37 * 8 + 4)
    for first, copied in ((0, False), (4, False), (1, True)):
        x = around[first : first + 37 * 8].view(37, 8)
        flat = group_by_group(x, 1, 320)
        assert (flat.data_ptr() != x.data_ptr()) == copied and flat.data_ptr() % 16 == 0
        assert torch.equal(flat[: 37 * 8], x.view(-1)) and not flat[37 * 8 :].any()
    between_others = around[: 36 * 8].view(36, 8)[:, :4]
    assert torch.equal(group_by_group(between_others, 1, 192)[: 36 * 4], between_others.reshape(-1))
