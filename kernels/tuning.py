"""Tile sizes of the Triton kernels: a table for each stage. Nothing is tuned at run time, because results depend on tile shapes
in their last bits, and all ranks must agree.

To retune, edit a row and measure. Rows ``(width, heads, shape)`` are tried in order; the first is taken whose width is at least
max(Dk, Dv) and whose heads are at least the heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile shape of one program.

    Args:
        rows: query rows (tokens times heads of the group) of a tile, a power of two of at least 16.
        keys: key rows of a tile, a power of two of at least 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over the inner loop's loads.
        max_tokens: upper limit of the tokens in a query tile, however many rows it has.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_tokens: int = 1 << 30

    def tokens(self, heads: int) -> int:
        """Tokens of a query tile for groups of ``heads`` query heads."""
        return max(1, min(self.rows // heads, self.max_tokens))

    def fitted(self, heads: int) -> TileConfig:
        """This shape with just the rows that a tile's tokens need: more for groups of very many heads, fewer for very few."""
        rows = max(16, 1 << (self.tokens(heads) * heads - 1).bit_length())
        return replace(self, rows=rows)


# Interval attention: with up to this many keys a query, the masked ends of its range cost more than the middle.
SHORT_SPAN = 1024

Table = tuple[tuple[int, int, TileConfig], ...]

_ANY = 1 << 30

# 16-bit inputs on Hopper (228 KiB of shared memory and 64 Ki registers a multiprocessor).
_HOPPER: dict[str, Table] = {
    "interval_forward": ((192, _ANY, TileConfig(128, 64, 8, 3)), (256, _ANY, TileConfig(128, 64, 8, 2))),
    "short_forward": ((192, _ANY, TileConfig(64, 64, 4, 2)), (256, _ANY, TileConfig(64, 64, 8, 2))),
    "interval_dq": (
        (128, _ANY, TileConfig(128, 64, 8, 3)),
        (192, _ANY, TileConfig(128, 64, 8, 2)),
        (256, _ANY, TileConfig(128, 32, 8, 2)),
    ),
    "interval_dkv": (
        (128, 8, TileConfig(64, 64, 4, 2)),
        (128, _ANY, TileConfig(64, 128, 8, 3)),
        (192, _ANY, TileConfig(32, 64, 4, 3)),
        (256, _ANY, TileConfig(32, 64, 8, 2)),
    ),
    "selected_forward": ((128, _ANY, TileConfig(64, 64, 4, 3, 16)), (256, _ANY, TileConfig(64, 64, 4, 2, 16))),
    "selected_dq": ((192, _ANY, TileConfig(64, 64, 4, 2, 16)), (256, _ANY, TileConfig(64, 64, 8, 2, 16))),
    "query_gradients": (
        (128, _ANY, TileConfig(64, 64, 4, 2, 16)),
        (192, _ANY, TileConfig(64, 32, 4, 3, 16)),
        (256, _ANY, TileConfig(64, 32, 8, 2, 16)),
    ),
    "selected_dkv": (
        (128, _ANY, TileConfig(32, 64, 4, 3)),
        (192, _ANY, TileConfig(16, 64, 4, 3)),
        (256, _ANY, TileConfig(32, 64, 8, 2)),
    ),
    "by_block_forward": (
        (128, _ANY, TileConfig(64, 64, 4, 3)),
        (192, _ANY, TileConfig(64, 64, 4, 2)),
        (256, _ANY, TileConfig(64, 64, 8, 2)),
    ),
    "by_block_dq": ((192, _ANY, TileConfig(64, 64, 4, 1)), (256, _ANY, TileConfig(64, 64, 8, 1))),
    "selection_scores": (
        (128, _ANY, TileConfig(128, 64, 4, 3, 32)),
        (192, _ANY, TileConfig(128, 64, 4, 2, 32)),
        (256, _ANY, TileConfig(64, 128, 8, 2, 32)),
    ),
}

# Everything else: other architectures, and float32 inputs, whose tiles take twice the room.
_SMALL: dict[str, Table] = {
    "interval_forward": ((64, _ANY, TileConfig(64, 32, 4, 2)), (256, _ANY, TileConfig(32, 32, 4, 1))),
    "short_forward": ((64, _ANY, TileConfig(64, 32, 4, 2)), (256, _ANY, TileConfig(32, 32, 4, 1))),
    "interval_dq": ((64, _ANY, TileConfig(64, 32, 4, 1)), (256, _ANY, TileConfig(32, 32, 4, 1))),
    "interval_dkv": ((64, _ANY, TileConfig(32, 32, 4, 1)), (256, _ANY, TileConfig(32, 32, 4, 1))),
    "selected_forward": ((64, _ANY, TileConfig(64, 32, 4, 2, 16)), (256, _ANY, TileConfig(32, 32, 4, 1, 16))),
    "selected_dq": ((64, _ANY, TileConfig(64, 32, 4, 1, 16)), (256, _ANY, TileConfig(32, 32, 4, 1, 16))),
    "query_gradients": ((64, _ANY, TileConfig(64, 32, 4, 1, 16)), (256, _ANY, TileConfig(32, 32, 4, 1, 16))),
    "selected_dkv": ((64, _ANY, TileConfig(32, 32, 4, 1)), (256, _ANY, TileConfig(32, 32, 4, 1))),
    "by_block_forward": ((64, _ANY, TileConfig(32, 32, 4, 1)), (256, _ANY, TileConfig(16, 32, 4, 1))),
    "by_block_dq": ((64, _ANY, TileConfig(32, 32, 4, 1)), (256, _ANY, TileConfig(16, 32, 4, 1))),
    "selection_scores": ((64, _ANY, TileConfig(64, 64, 4, 1, 32)), (256, _ANY, TileConfig(32, 64, 4, 1, 32))),
}


def tile_config(stage: str, dtype: torch.dtype, device: torch.device, heads: int, width: int) -> TileConfig:
    """The tile shape of a stage.

    Args:
        stage: a key of the tables above.
        dtype, device: of the inputs.
        heads: H, query heads of a K/V group.
        width: max(Dk, Dv), channels.

    Raises:
        ValueError: heads wider than any row of the table.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    table = (_HOPPER if hopper and dtype.itemsize == 2 else _SMALL)[stage]
    for most_channels, most_heads, config in table:
        if width <= most_channels and heads <= most_heads:
            return config.fitted(heads)
    raise ValueError(f"heads of {width} channels are wider than the {table[-1][0]} that the kernels support")
