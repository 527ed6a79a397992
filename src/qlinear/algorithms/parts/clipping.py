"""Scales of least squared error, instead of scales that just hold the largest weight.

    minimise over r   Σ_j h_j (w_j - Q_r(w_j))²        r in ratios, one choice per tile (a row or group)

Q_r rounds with the range of the tile multiplied by r. Few weights of a 4-bit group lie near the largest one; clipping
those buys finer steps for all others. h_j weights the errors of input channel j: its mean square (the diagonal of the
hessian), or 1. This is the search of GPTQ's --mse option. With the hessian within the tile, e H_tile eᵀ, it is AWQ's
clipping search (Lin et al. 2023, section 3.2). r = 1 is round to nearest, so no tile gets worse.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...formats.rounding import choose_qparams, nearest_values, qparams_from_range
from ...formats.scales import global_scale_of
from ...formats.scheme import ScaleDType, TensorFormat

# int4's absmax / 7.5 has no code for the largest weight itself: absmax / 7 gives it 7, absmax / 8 gives it -8. In a
# column that matters much more than its neighbours, as AWQ makes some, that weight is often the largest.
ENDS = (1.0, 15 / 14, 15 / 16)
RATIOS = (*ENDS, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
# Steps of the scales' own grids. Powers of two: the neighbours. e4m3 has steps of 1/16 to 1/8; with 3/2 the largest
# weight gets the code 4 instead of 6, where the codes are denser (four over six; Cook et al. 2025).
_COARSE_RATIOS: dict[ScaleDType, tuple[float, ...]] = {
    "float8_e8m0fnu": (1.0, 2.0, 0.5),
    "float8_e4m3fn": (1.0, 1.5, 1.33, 1.2, 1.09, 0.91, 0.83),
}
# Elements of a working copy that stay in a core's cache.
_CHUNK = 1 << 18


def least_error_qparams(
    weight: Tensor,
    fmt: TensorFormat,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, shaped as `choose_qparams` returns them, of least weighted squared error among `ratios`.

    weight: (out, in) float32, finite. importance: h (in,), not negative, or the hessian within each tile of g columns
    (in / g, g, g); 1 if None. A tile of several rows (granularity tensor or block) keeps the range of its extremes,
    because the search would gain next to nothing there.
    """
    columns = fmt.tile(weight.shape)[1]
    if weight.shape[0] == 0 or fmt.granularity in ("tensor", "block"):
        return choose_qparams(weight, fmt, scale_dtype, global_scale)
    h = torch.ones_like(weight[0]) if importance is None else importance
    h = h.view(-1, 1, columns) if h.dim() == 1 else h
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    if fmt.has_global_scale and global_scale is None:
        global_scale = global_scale_of(torch.maximum(weight.amax(), -weight.amin()))
    stored, ratios = (scale_dtype, global_scale), _ratios_on(fmt, ratios)
    qparams = [_search(_tiles(part, columns), h, fmt, stored, ratios) for part in torch.split(weight, step)]
    shape = fmt.scale_shape(weight.shape)
    zeros = [zero for _, zero in qparams if zero is not None]
    return _joined([scale for scale, _ in qparams], shape), _joined(zeros, shape) if zeros else None


def _ratios_on(fmt: TensorFormat, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """The ratios to try where `ratios` are wanted: those of the scales' own coarse grid, where they have one."""
    return ratios if fmt.scale_dtype is None or ratios == (1.0,) else _COARSE_RATIOS[fmt.scale_dtype]


def _tiles(rows: Tensor, columns: int) -> Tensor:
    """Rows (n, in) by tile: (in / columns, n, columns), contiguous per tile."""
    return rows.reshape(len(rows), -1, columns).transpose(0, 1).contiguous()


def _joined(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Values per tile (in / columns, n, 1) of several parts, as one tensor of the scales' shape."""
    return torch.cat([part.squeeze(2).T for part in parts]).reshape(shape)


def _error(off: Tensor, h: Tensor) -> Tensor:
    """Weighted squared error (tiles, n, 1) of off (tiles, n, columns), which is overwritten; h: see `_search`."""
    if h.shape[1] == 1:
        return off.square_().mul_(h).sum(2, keepdim=True)
    return (off @ h).mul_(off).sum(2, keepdim=True)


def _search(
    tiles: Tensor,
    h: Tensor,
    fmt: TensorFormat,
    stored: tuple[torch.dtype, Tensor | None],
    ratios: tuple[float, ...],
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (in / columns, n, 1) of tiles (in / columns, n, columns).

    h: (·, 1, columns), or the hessian within each tile (·, columns, columns). stored: the scales' dtype and divisor.
    """
    fmt = replace(fmt, granularity="channel", group_size=None)
    low, high = tiles.amin(2, keepdim=True), tiles.amax(2, keepdim=True)
    best, scale, zero_point = None, low, None
    for ratio in ratios:
        new_scale, new_zero = qparams_from_range(low * ratio, high * ratio, fmt, *stored)
        off = nearest_values(tiles, new_scale, new_zero, fmt).sub_(tiles)
        error = _error(off, h)
        if best is None:
            best, scale, zero_point = error, new_scale, new_zero
            continue
        is_better = error < best
        best, scale = torch.where(is_better, error, best), torch.where(is_better, new_scale, scale)
        if zero_point is not None and new_zero is not None:
            zero_point = torch.where(is_better, new_zero, zero_point)
    return scale, zero_point
