"""GPTQ: weights are rounded column by column, and each error is made up for by the columns still to come.

Frantar et al. 2022 (GPTQ), in the form of Chee et al. 2023 (QuIP, theorem 6), which is the same algorithm and needs
no inverse. A layer's output error is a quadratic form in the weight's error E = W - Q, with H the mean of x xᵀ:

    loss = tr(E H Eᵀ)        H + ridge = (I + U) D (I + U)ᵀ,  U strictly upper triangular, D diagonal
         = Σ_k D_k |E_k + E_{<k} U_{<k,k}|²  - Σ_k ridge_k |E_k|²

Taken in order, term k is least when column k is rounded from its target W_k + E_{<k} U_{<k,k}. Columns with the
largest second moment go first, when all others are still there to make up for them (activation order). The grid is
fixed before that, so the codes of a group lie together as in any other checkpoint: no g_idx.

The targets are gathered by halves: the left half of the columns is rounded, one matrix product brings its errors to
the right half, and so on inside each. All work but the rounding is in large products; at any depth it fits a cache.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import NumericsError
from ..numerics import QuantizedTensor, choose_qparams, dequantize, quantize, quantize_tensor, require_finite
from ..scheme import Scheme, TensorFormat
from .descent import descend
from .grid import least_error_qparams
from .tiles import by_tile_column

_DAMPING = 0.01
_PANEL = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """(I + U) D (I + U)ᵀ of a group's second moments, made once for all its weights.

    order: (in,) long, the columns from most to least important. upper: U (in, in), pivots: D (in,), both in that
    order. damping: the share of each channel's own second moment that was added to it.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    damping: float


@dataclass(frozen=True, slots=True)
class Rounded:
    """What GPTQ made of one weight.

    loss, rtn_loss: tr(E H Eᵀ) of the result and of round to nearest. damping: see `Factor`; None if the second moments
    could not be factorized, and the result is round to nearest. rows_kept: how many rows are better off rounded to
    nearest, and are.
    """

    weight: QuantizedTensor
    loss: float
    rtn_loss: float
    damping: float | None
    rows_kept: int

    @property
    def fell_back(self) -> bool:
        """Whether nothing but round to nearest was possible."""
        return self.damping is None


def factorize(moment: Tensor, damping: float = _DAMPING, name: str = "input") -> Factor | None:
    """Factorize second moments (in, in) float32; None if even a damping of 1 doesn't make them positive definite.

    damping: to begin with; ten times as much after each failure. It is relative to each channel's own second moment,
    so that an outlier channel does not drown the others. A channel that was always 0 is left alone: it has no part
    in any other. Raises NumericsError, with `name`, on NaN or infinity.
    """
    require_finite(moment, f"the second moment of {name}")
    power = moment.diagonal()
    order = power.argsort(descending=True, stable=True)
    size = power.sqrt().masked_fill(power <= 0, 1.0)[order]
    # Factorized as correlations, so that float32 is enough however far apart the channels' sizes are. Cholesky's
    # triangle is the lower one; reversing rows and columns before and after makes it the upper.
    correlation = moment[order.flip(0)][:, order.flip(0)] / size.flip(0) / size.flip(0).unsqueeze(1)
    while damping <= 1:
        correlation.diagonal().copy_((power > 0)[order.flip(0)]).add_(damping)
        lower, failed = torch.linalg.cholesky_ex(correlation)
        if not failed:
            return _factor(lower.flip(0, 1), size, order, damping)
        damping *= 10
    return None


def _factor(upper: Tensor, size: Tensor, order: Tensor, damping: float) -> Factor:
    """From the triangle of the correlations, with ones on U's diagonal left in: nothing reads it."""
    diagonal = upper.diagonal().clone()
    pivots = (diagonal * size).square()
    return Factor(order, upper.div_(diagonal * size).mul_(size.unsqueeze(1)), pivots, damping)


def gptq(
    weight: Tensor,
    scheme: Scheme,
    moment: Tensor,
    factor: Factor | None,
    *,
    grid: Literal["least-error", "extremes"] = "least-error",
    sweeps: int = 2,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Rounded:
    """Codes of a weight whose output error on the calibration inputs is never above round to nearest's.

    weight: (out, in) float32. moment: the mean of x xᵀ (in, in) float32; factor: `factorize(moment)`, shared by all
    weights that read x. grid: scales from `least_error_qparams` or from the extremes of each tile. sweeps: of the
    descent that follows. scale_dtype: what scales are rounded to before codes are chosen. Raises NumericsError, with
    `name`, on NaN or infinity, and SchemeError where the scheme does not fit.
    """
    fmt = scheme.weight
    if moment.shape != (weight.shape[1],) * 2:
        raise NumericsError(
            f"moment must be (in, in) of {name} {tuple(weight.shape)}; got {tuple(moment.shape)}"
        )
    nearest = quantize_tensor(weight, fmt, name, scale_dtype)
    rtn_losses = row_losses(weight - nearest.dequantize(), moment)
    rtn_loss = float(rtn_losses.sum())
    if factor is None:
        return Rounded(nearest, rtn_loss, rtn_loss, None, weight.shape[0])
    if grid == "least-error":
        scale, zero_point = least_error_qparams(weight, fmt, moment.diagonal(), scale_dtype)
    else:
        scale, zero_point = choose_qparams(weight, fmt, scale_dtype)
    found = QuantizedTensor(_propagate(weight, factor, scale, zero_point, fmt), scale, zero_point, fmt)
    found = descend(weight, found, moment, sweeps, scale_dtype)
    losses = row_losses(weight - found.dequantize(), moment)
    keep = losses > rtn_losses
    if fmt.tile(weight.shape)[0] > 1:  # rows share scales, and are kept or not together
        keep = (losses.sum() > rtn_losses.sum()).expand_as(keep)
    loss = float(torch.where(keep, rtn_losses, losses).sum())
    return Rounded(_choose(keep, nearest, found), loss, rtn_loss, factor.damping, int(keep.sum()))


def row_losses(error: Tensor, moment: Tensor) -> Tensor:
    """e H eᵀ for each row e of a weight's error (out, in): (out,). What is symmetric in H is computed once."""
    total = torch.zeros_like(error[:, 0])
    for start in range(0, error.shape[1], _PANEL):
        stop = min(start + _PANEL, error.shape[1])
        panel = error[:, start:stop]
        into = torch.mm(error[:, :start], moment[:start, start:stop]).mul_(2)
        total += into.addmm_(panel, moment[start:stop, start:stop]).mul_(panel).sum(1)
    return total


def _choose(keep: Tensor, nearest: QuantizedTensor, found: QuantizedTensor) -> QuantizedTensor:
    """Rows of `nearest` where `keep` (out,) says so, of `found` elsewhere."""
    if not bool(keep.any()):
        return found
    if bool(keep.all()):
        return nearest
    zero_point = None
    if nearest.zero_point is not None and found.zero_point is not None:
        zero_point = torch.where(keep.unsqueeze(1), nearest.zero_point, found.zero_point)
    codes = torch.where(keep.unsqueeze(1), nearest.codes, found.codes)
    return QuantizedTensor(
        codes, torch.where(keep.unsqueeze(1), nearest.scale, found.scale), zero_point, found.format
    )


def _propagate(
    weight: Tensor, factor: Factor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat
) -> Tensor:
    """Codes (out, in) on a grid that is given, each column rounded from its target. Here columns are rows."""
    order, upper = factor.order, factor.upper
    targets = weight.T[order]
    errors = targets.clone()
    codes = torch.empty(targets.shape, dtype=fmt.storage, device=weight.device)
    scales = by_tile_column(scale, fmt, weight.shape)
    zeros = None if zero_point is None else by_tile_column(zero_point, fmt, weight.shape)
    tile_of = (order // fmt.tile(weight.shape)[1]).tolist()
    one_scale_each = TensorFormat(fmt.dtype, "token", symmetric=fmt.symmetric)

    def sweep(start: int, stop: int) -> None:
        if stop - start == 1:
            tile = tile_of[start]
            grid = scales[tile], None if zeros is None else zeros[tile]
            code = quantize(targets[start], *grid, one_scale_each)
            codes[start] = code
            errors[start] -= dequantize(code, *grid, one_scale_each)
            return
        middle = (start + stop) // 2
        sweep(start, middle)
        targets[middle:stop].addmm_(upper[start:middle, middle:stop].T, errors[start:middle])
        sweep(middle, stop)

    sweep(0, len(tile_of))
    ordered = torch.empty_like(codes)
    ordered.view(torch.uint8)[order] = codes.view(torch.uint8)
    return ordered.T.contiguous()
