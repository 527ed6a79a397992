"""Scales that cost the least squared error, instead of those that just hold the largest weight.

    minimise over r   Σ_j h_j (w_j - Q_r(w_j))²        r in ratios, one choice per row or group

Q_r rounds with the range of the tile narrowed to r of itself. Few weights of a 4-bit group lie near its largest;
clipping them buys finer steps for all the others. h says how much an error in each input channel matters: the mean
square of that channel (the diagonal of the second moments), or 1. This is the clipping search of AWQ (Lin et al.
2023, section 3.2) and of GPTQ's --mse, on the objective of both. r = 1 is round to nearest, so no tile gets worse.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..numerics import choose_qparams, dequantize, qparams_from_range, quantize
from ..scheme import TensorFormat

# A little above 1: int4's absmax / 7.5 lies between the best for 7 steps and for 8.
RATIOS = (1.0, 1.06, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
# Elements of a working copy that stay in a core's cache.
_CHUNK = 1 << 18


def least_error_qparams(
    weight: Tensor,
    fmt: TensorFormat,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point, as `choose_qparams` returns them, of least weighted squared error among `ratios`.

    weight: (out, in) float32, finite. importance: h (in,), not negative; 1 if None. A tile that spans rows (granularity
    tensor or block) keeps the range of its extremes: there the search would save next to nothing.
    """
    columns = fmt.tile(weight.shape)[1]
    if weight.shape[0] == 0 or fmt.granularity in ("tensor", "block"):
        return choose_qparams(weight, fmt, scale_dtype)
    h = torch.ones_like(weight[0]) if importance is None else importance
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    found = [
        _search(part.reshape(-1, columns), h.view(-1, columns).repeat(len(part), 1), fmt, scale_dtype, ratios)
        for part in torch.split(weight, step)
    ]
    shape = fmt.scale_shape(weight.shape)
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]).view(shape), torch.cat(zeros).view(
        shape
    ) if zeros else None


def _search(
    tiles: Tensor, h: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype, ratios: tuple[float, ...]
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (tiles, 1) of tiles (tiles, columns), each weighted by its row of h."""
    fmt = replace(fmt, granularity="channel", group_size=None)
    low, high = tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)
    best, scale, zero_point = None, low, None
    for ratio in ratios:
        new_scale, new_zero = qparams_from_range(low * ratio, high * ratio, fmt, scale_dtype)
        off = dequantize(quantize(tiles, new_scale, new_zero, fmt), new_scale, new_zero, fmt).sub_(tiles)
        error = off.square_().mul_(h).sum(1, keepdim=True)
        if best is None:
            best, scale, zero_point = error, new_scale, new_zero
            continue
        is_better = error < best
        best, scale = torch.where(is_better, error, best), torch.where(is_better, new_scale, scale)
        if zero_point is not None and new_zero is not None:
            zero_point = torch.where(is_better, new_zero, zero_point)
    return scale, zero_point
