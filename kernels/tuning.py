"""Static tile sizes: a table for each stage, by head width. Nothing is tuned at run time, so that all ranks agree.

To retune, edit a row and measure. Rows are tried in order; the first whose ``width`` covers max(Dk, Dv) is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """Shape of one program.

    Args:
        rows: query rows (tokens times heads of the group) of a tile, a power of two of at least 16.
        keys: key rows of a tile, a power of two of at least 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over the inner loop's loads.
        max_tokens: most tokens of a query tile, whatever its rows.
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
        """This shape with as many rows as the tokens of a tile need: more for very large groups, fewer for very small ones."""
        rows = max(16, 1 << (self.tokens(heads) * heads - 1).bit_length())
        return self if rows == self.rows else TileConfig(rows, self.keys, self.num_warps, self.num_stages, self.max_tokens)


Table = tuple[tuple[int, TileConfig], ...]

# 16-bit inputs on Hopper (228 KiB of shared memory and 64 Ki registers a multiprocessor).
_HOPPER: dict[str, Table] = {
    "interval_forward": ((128, TileConfig(128, 128, 8, 3)), (192, TileConfig(128, 64, 8, 3)), (256, TileConfig(128, 64, 8, 2))),
    "interval_dq": ((128, TileConfig(64, 64, 4, 2)), (192, TileConfig(128, 64, 8, 2)), (256, TileConfig(128, 32, 8, 2))),
    "interval_dkv": ((128, TileConfig(64, 128, 8, 3)), (192, TileConfig(64, 64, 8, 2)), (256, TileConfig(32, 64, 8, 2))),
    "selected_forward": ((128, TileConfig(64, 64, 4, 2, 16)), (256, TileConfig(64, 64, 4, 2, 16))),
    "selected_dq": ((192, TileConfig(64, 64, 4, 2, 16)), (256, TileConfig(64, 64, 8, 2, 16))),
    "selected_dkv": ((128, TileConfig(64, 64, 4, 3)), (256, TileConfig(32, 64, 8, 2))),
    "selection_scores": ((128, TileConfig(128, 64, 4, 3, 32)), (256, TileConfig(64, 128, 8, 2, 32))),
}

# Everything else: other architectures, and float32 inputs, whose tiles take twice the room.
_SMALL: dict[str, Table] = {
    "interval_forward": ((64, TileConfig(64, 32, 4, 2)), (256, TileConfig(32, 32, 4, 1))),
    "interval_dq": ((64, TileConfig(64, 32, 4, 1)), (256, TileConfig(32, 32, 4, 1))),
    "interval_dkv": ((64, TileConfig(32, 32, 4, 1)), (256, TileConfig(32, 32, 4, 1))),
    "selected_forward": ((64, TileConfig(64, 32, 4, 2, 16)), (256, TileConfig(32, 32, 4, 1, 16))),
    "selected_dq": ((64, TileConfig(64, 32, 4, 1, 16)), (256, TileConfig(32, 32, 4, 1, 16))),
    "selected_dkv": ((64, TileConfig(32, 32, 4, 1)), (256, TileConfig(32, 32, 4, 1))),
    "selection_scores": ((64, TileConfig(64, 64, 4, 1, 32)), (256, TileConfig(32, 64, 4, 1, 32))),
}


def tile_config(stage: str, dtype: torch.dtype, device: torch.device, heads: int, width: int) -> TileConfig:
    """Tile shape of a stage.

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
    for limit, config in table:
        if width <= limit:
            return config.fitted(heads)
    raise ValueError(f"heads of {width} channels are wider than the {table[-1][0]} that the kernels support")
