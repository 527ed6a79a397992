"""A weight column by column, for GPTQ and the coordinate descent.

Layout: weights are transposed, (in, out), so that a column of the weight is contiguous.

Units: columns are held in steps, the weight divided by its scale. Grid points are codes minus their zero point, so
rounding needs no scale.

Order: `by_halves`. What changed in the left half of some columns is carried to the right half by one matrix product,
and each half is treated the same way, down to a few columns. So all work but the rounding is in large products.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats.rounding import QuantizedTensor, nearest_steps_
from ...formats.scales import storable_scale
from ...formats.scheme import TensorFormat

# Columns that are processed one by one. Below this, adding one to another costs less than calling a product.
FEW = 4


@dataclass(frozen=True, slots=True)
class ColumnGrid:
    """The grid that each column of a weight (out, in) is rounded to.

    format, scale, zero_point: of the weight, as in `QuantizedTensor`. scales, zeros: scale and zero point of every row,
    by tile of columns: (tiles, out). width: columns of a tile. scale_dtype, global_scale: see `storable_scale`.
    """

    format: TensorFormat
    scale: Tensor
    zero_point: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    width: int
    scale_dtype: torch.dtype
    global_scale: Tensor | None

    @classmethod
    def of(
        cls,
        qparams: tuple[Tensor, Tensor | None],
        fmt: TensorFormat,
        shape: torch.Size,
        scale_dtype: torch.dtype = torch.float32,
        global_scale: Tensor | None = None,
    ) -> "ColumnGrid":
        """The grid with this scale and zero point for a weight of this shape."""
        scale, zero_point = qparams
        zeros = None if zero_point is None else _by_tile(zero_point, fmt, shape)
        scales, width = _by_tile(scale, fmt, shape), fmt.tile(shape)[1]
        return cls(fmt, scale, zero_point, scales, zeros, width, scale_dtype, global_scale)

    def round_(self, steps: Tensor, column: int) -> Tensor:
        """Round steps to the nearest grid points, in place.

        steps: (out,), or (n, out) for n columns of one tile, in units of its scale. column: the first one's index.
        """
        zeros = None if self.zeros is None else self.zeros[column // self.width]
        return nearest_steps_(steps, zeros, self.format)

    def round_all_(self, columns: Tensor) -> Tensor:
        """Weights (in, out) to the nearest steps of their grids, in place."""
        for start in range(0, len(columns), self.width):
            part = columns[start : start + self.width]
            self.round_(part.div_(self.scales[start // self.width]), start)
        return columns

    def values(self, steps: Tensor) -> Tensor:
        """The weights (in, out) that steps (in, out) stand for."""
        values = torch.empty_like(steps)
        for tile, scale in enumerate(self.scales):
            part = slice(tile * self.width, (tile + 1) * self.width)
            torch.mul(steps[part], scale, out=values[part])
        return values

    def storable(self, scale: Tensor) -> Tensor:
        """The nearest scales that a checkpoint can store."""
        return storable_scale(scale, self.format, self.scale_dtype, self.global_scale)

    def put_rows(self, rows: Tensor, other: "ColumnGrid") -> None:
        """Copy the grid of another, in the rows where the mask `rows` (out,) is true."""
        self.scales.copy_(torch.where(rows, other.scales, self.scales))
        if self.zeros is not None and other.zeros is not None:
            self.zeros.copy_(torch.where(rows, other.zeros, self.zeros))

    def quantized(self, steps: Tensor) -> QuantizedTensor:
        """The codes of steps (in, out), which must be on the grid."""
        codes = torch.empty(steps.shape[::-1], dtype=self.format.storage, device=steps.device)
        for start in range(0, len(steps), self.width):
            part = slice(start, start + self.width)
            zeros = None if self.zeros is None else self.zeros[start // self.width]
            codes[:, part] = (steps[part] if zeros is None else steps[part] + zeros).T
        if self.format.granularity not in ("channel", "group"):
            return QuantizedTensor(codes, self.scale, self.zero_point, self.format, self.global_scale)
        zero_point = None if self.zeros is None else self.zeros.T.contiguous()
        return QuantizedTensor(codes, self.scales.T.contiguous(), zero_point, self.format, self.global_scale)


def _by_tile(per_tile: Tensor, fmt: TensorFormat, shape: torch.Size) -> Tensor:
    """A scale or zero point as (tiles, out)."""
    down = per_tile.reshape(1 if fmt.granularity == "tensor" else per_tile.shape[0], -1)
    return down.repeat_interleave(fmt.tile(shape)[0], 0)[: shape[0]].T.contiguous()


def by_halves(
    start: int,
    stop: int,
    few: int,
    visit: Callable[[int, int], None],
    carry: Callable[[slice, slice], None],
    back: bool = False,
) -> None:
    """Visit the columns from start to stop in runs of at most `few`.

    visit: called with the start and stop of each run, in order. carry: called with (from, to) after each half. back:
    whether to carry each right half back to its left half as well.
    """
    if stop - start <= few:
        visit(start, stop)
        return
    middle = start + ((stop - start) // few + 1) // 2 * few
    left, right = slice(start, middle), slice(middle, stop)
    by_halves(start, middle, few, visit, carry, back)
    carry(left, right)
    by_halves(middle, stop, few, visit, carry, back)
    if back:
        carry(right, left)
