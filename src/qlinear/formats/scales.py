"""Scales: how large they are, and which values a checkpoint can store.

    scale dtype      stored values                                          effective scale
    None             the model's dtype, or float32                          the stored value
    float8_e8m0fnu   powers of two (OCP Microscaling, MXFP4 and MXFP8)      the stored value
    float8_e4m3fn    e4m3, beside one float32 divisor per tensor (NVFP4)    the stored value / the divisor

In memory every scale is the effective one, in float32, so the rest of the code needs no case for a format. NVFP4's
divisor is called `global_scale`, as compressed-tensors calls it. Division and multiplication by it return the same e4m3
value, because float32 has 20 more bits than e4m3.

The rules for powers of two and for NVFP4 are those of compressed-tensors, to the bit.
"""

import torch
from torch import Tensor

from .scheme import TensorFormat

_TINY = torch.finfo(torch.float32).tiny
_E4M3_MAX = 448.0
# Bits of a float32: the exponent and sign; 1/4 and 1/2 of the mantissa's range.
_EXPONENT, _QUARTER, _HALF = -(1 << 23), 1 << 21, 1 << 22
_LARGEST_POWER = 2.0**127


def scale_from_absmax(
    absmax: Tensor,
    fmt: TensorFormat,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The symmetric scale of each tile from its largest magnitude.

    absmax: float32. scale_dtype, global_scale: see `storable_scale`. Returns absmax / steps, the shape of `absmax`. For
    powers of two: the exponent of absmax, one more from a mantissa of 1.75 on, less that of the largest code.
    """
    if fmt.scale_dtype == "float8_e8m0fnu":
        return _nonzero(_power_of_two(absmax, _QUARTER) / fmt.largest_power)
    return storable_scale(absmax / fmt.steps, fmt, scale_dtype, global_scale)


def storable_scale(
    scale: Tensor,
    fmt: TensorFormat,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> Tensor:
    """The nearest scale that a checkpoint can store; 1 where that is zero, or subnormal in float32.

    scale: effective scales, float32, not negative. scale_dtype: the dtype that scales are stored in, where the format
    does not define one. global_scale: the divisor, float32, (1,) or broadcasting against `scale`, if there is one.
    """
    if fmt.scale_dtype == "float8_e8m0fnu":
        return _nonzero(_power_of_two(scale, _HALF))
    if fmt.has_global_scale and global_scale is not None:
        stored = (scale * global_scale).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
        return torch.threshold(stored, 0.0, 1.0) / global_scale
    return _nonzero(scale if scale_dtype == scale.dtype else scale.to(scale_dtype).float())


def global_scale_of(absmax: Tensor) -> Tensor:
    """NVFP4's divisor (1,) float32 for tensors whose largest magnitude is `absmax` (a scalar, or one element).

    Layers that an engine merges must have the same one. It maps absmax to the largest code, 6, times the largest e4m3
    scale, 448. 1 where absmax is 0.
    """
    divisor = _E4M3_MAX * 6.0 / absmax.float().clamp(min=_TINY)
    return divisor.masked_fill(divisor == torch.inf, 1.0).reshape(1)


def _power_of_two(x: Tensor, carry: int) -> Tensor:
    """x rounded to a power of two; `carry`, added to the mantissa, decides from where on it is rounded up."""
    rounded = ((x.contiguous().view(torch.int32) + carry) & _EXPONENT).view(torch.float32)
    return rounded.masked_fill(rounded.isinf() & x.isfinite(), _LARGEST_POWER)


def _nonzero(stored: Tensor) -> Tensor:
    return torch.threshold(stored, _TINY, 1.0)
