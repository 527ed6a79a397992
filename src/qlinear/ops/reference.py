"""The quantized linear layer in plain torch: the definition that every other kernel is tested against.

For products of codes with codes, the order of float operations is part of the definition, because kernels must equal
it bit for bit:

    acc = Σ_k (xq - x_zp) * wq                       int32, exact
    y   = ((float32(acc) * weight_scale) * x_scale) + bias      float32, then one cast to the output dtype

The integer product is computed by float32 matrix products, which every device has. They are exact while no partial sum
exceeds 2²⁴, so `in` is cut into slices whose sums cannot: 1024 for int8 codes, 512 for uint8.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats.rounding import choose_qparams, quantize
from ..formats.scheme import TensorFormat

TOKEN_INT8 = TensorFormat("int8", "token", dynamic=True)
TOKEN_INT8_ASYMMETRIC = TensorFormat("int8", "token", symmetric=False, dynamic=True)
_SLICE = {torch.int8: 1024, torch.uint8: 512}


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (M, in) int8 or uint8, weight (out, in) int8 → their int32 product (M, out), exact."""
    step = _SLICE[codes.dtype]
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    # Autocast would round the float32 sums of the slices to bfloat16.
    with torch.autocast(codes.device.type, enabled=False):
        for start in range(0, weight.shape[1], step):
            part = slice(start, start + step)
            total += (codes[:, part].float() @ weight[:, part].float().t()).int()
    return total


def migrate(x: Tensor, migration_scale: Tensor | None) -> Tensor:
    """`x / migration_scale` in float32; x (*, in) of any float dtype, migration_scale (in,) float32."""
    return x.float() if migration_scale is None else x.float() / migration_scale


def quantize_tokens(
    x: Tensor, migration_scale: Tensor | None, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes (*, in), scale (*, 1) float32 and zero point (*, 1) of each token of x (*, in).

    NaN or infinity in a token makes its scale NaN or infinite, so no output of that token is finite. Other tokens do
    not change.
    """
    x = migrate(x, migration_scale)
    fmt = TOKEN_INT8 if symmetric else TOKEN_INT8_ASYMMETRIC
    scale, zero_point = choose_qparams(x, fmt)
    return quantize(x, scale, zero_point, fmt), scale, zero_point


def static_format(zero_point: Tensor | None) -> TensorFormat:
    """The activation format that a per-tensor zero point implies: its dtype is the dtype of the codes."""
    if zero_point is None:
        return TensorFormat("int8", "tensor")
    return TensorFormat("uint8" if zero_point.dtype == torch.uint8 else "int8", "tensor", symmetric=False)


def quantize_static(
    x: Tensor, migration_scale: Tensor | None, scale: Tensor, zero_point: Tensor | None
) -> Tensor:
    """Codes of x (*, in) with a given scale (1,) and zero point (1,), whose dtype is that of the codes."""
    return quantize(migrate(x, migration_scale), scale, zero_point, static_format(zero_point))


def codes_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The layer on activation codes.

    codes: (*, in) int8 or uint8. scale, zero_point: (*, 1) per token or (1,) per tensor. weight: (out, in) int8.
    weight_scale, weight_zero_point: (out, 1) or (1,). bias: (out,). Returns (*, out) in `dtype`.
    """
    rows = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1])
    acc = int_matmul(rows, weight)
    if zero_point is not None:
        acc -= zero_point.reshape(-1, 1).int() * weight.sum(1, dtype=torch.int32)
    if weight_zero_point is not None:
        inputs = rows.sum(1, dtype=torch.int32)
        if zero_point is not None:
            inputs = inputs - zero_point.reshape(-1).int() * rows.shape[1]
        acc -= inputs[:, None] * weight_zero_point.reshape(-1).int()
    y = acc.float().mul_(weight_scale.reshape(-1)).mul_(scale.reshape(-1, 1))
    if bias is not None:
        y += bias
    return y.to(dtype).view(*codes.shape[:-1], weight.shape[0])


def requantized_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero_point: Tensor,
) -> Tensor:
    """`codes_linear`, rounded to codes of the input's dtype: clamp(round(y / out_scale) + out_zero_point).

    out_scale: (1,) float32. out_zero_point: (1,) in the codes' dtype.
    """
    y = codes_linear(codes, scale, zero_point, weight, weight_scale, weight_zero_point, bias, torch.float32)
    return quantize(y, out_scale, out_zero_point, static_format(out_zero_point))


def dynamic_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    symmetric: bool,
) -> Tensor:
    """The whole layer with a scale per token: quantize x (*, in), then `codes_linear`, in x's dtype."""
    codes, scale, zero_point = quantize_tokens(x, migration_scale, symmetric)
    return codes_linear(codes, scale, zero_point, weight, weight_scale, None, bias, x.dtype)


def static_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
) -> Tensor:
    """The whole layer with one calibrated input scale (1,): quantize x (*, in), then `codes_linear`."""
    codes = quantize_static(x, migration_scale, input_scale, input_zero_point)
    return codes_linear(codes, input_scale, input_zero_point, weight, weight_scale, None, bias, x.dtype)


def dequantized(weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None) -> Tensor:
    """(weight - zero point) * scale (out, in) in float32, a scale and zero point per part of a row (out, parts)."""
    return dequantize_into(
        weight.new_empty(weight.shape, dtype=torch.float32), weight, weight_scale, weight_zero_point
    )


def dequantize_into(
    buffer: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    """`dequantized`, in the first rows of `buffer` (at least out, in) float32."""
    values, parts = buffer[: len(weight)].copy_(weight), weight_scale.shape[-1]
    tiles = values.view(len(values), parts, values.shape[1] // parts)
    if weight_zero_point is not None:
        tiles -= weight_zero_point.reshape(-1, parts, 1)
    tiles *= weight_scale.reshape(-1, parts, 1)
    return values


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """The layer on floats x (*, in), in their dtype: x / migration_scale times the dequantized weight.

    weight: codes (out, in) of `bits` bits, in any storage dtype. weight_scale, weight_zero_point: (out, parts), for
    equal parts of a row. bias: (out,).
    """
    migrated = x if migration_scale is None else migrate(x, migration_scale).to(x.dtype)
    matrix = dequantized(weight, weight_scale, weight_zero_point).to(x.dtype)
    return F.linear(migrated, matrix, None if bias is None else bias.to(x.dtype))
