"""Scales and zero points by tile of columns, for what takes a weight column by column."""

import torch
from torch import Tensor

from ..scheme import TensorFormat


def by_tile_column(per_tile: Tensor, fmt: TensorFormat, shape: torch.Size) -> Tensor:
    """A scale or zero point as (column tiles, out): one contiguous vector for all elements of a weight's column."""
    down = per_tile.reshape(1 if fmt.granularity == "tensor" else per_tile.shape[0], -1)
    return down.repeat_interleave(fmt.tile(shape)[0], 0)[: shape[0]].T.contiguous()
