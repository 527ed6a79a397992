"""The layer on float inputs: the weight is dequantized in tiles, each just before its product.

A 4096 × 4096 weight takes 64 MB in float32. Dequantized whole, it would be written to memory and read back on every
call, which costs several times the product with one token. So a few rows at a time are dequantized, multiplied and
dropped. Where torch has a product with the 4-bit codes themselves (`torch_int4`), few tokens go there.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference, torch_int4

# Elements of a tile's float32 copy: enough rows for an efficient product, few enough for the cache.
_CHUNK = 1 << 20


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """`reference.weight_only_linear`, up to rounding in the dtype it computes in."""
    migrated = reference.migrate(x, migration_scale).to(x.dtype) if migration_scale is not None else x
    rows = migrated.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if bits == 4 and torch_int4.fits(rows, weight, weight_scale):
        y = torch_int4.linear(rows, weight, weight_scale, weight_zero_point)
        y = y if bias is None else (y + bias.float()).to(x.dtype)
    elif x.is_cpu:
        y = _in_chunks(rows, weight, weight_scale, weight_zero_point, bias)
    else:
        y = reference.weight_only_linear(rows, weight, weight_scale, weight_zero_point, None, bias, bits)
    return y.view(*x.shape[:-1], weight.shape[0])


def _in_chunks(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The layer on x (rows, in), some outputs at a time, in x's dtype if the processor has native products in it."""
    dtype = x.dtype if x.dtype.itemsize > 2 or multiplies_in(x.dtype) else torch.float32
    inputs, out = x.to(dtype), x.new_empty(len(x), len(weight))
    count = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), count):
        part = slice(start, start + count)
        zeros = None if weight_zero_point is None else weight_zero_point[part]
        matrix = reference.dequantized(weight[part], weight_scale[part], zeros).to(dtype)
        out[:, part] = F.linear(inputs, matrix, None if bias is None else bias[part].to(dtype))
    return out


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this processor has native matrix products in a half dtype, instead of emulating them in float32."""
    has = torch.cpu.get_capabilities()
    native = {
        torch.bfloat16: has.get("amx_bf16") or has.get("avx512_bf16") or has.get("bf16"),
        torch.float16: has.get("amx_fp16") or has.get("fp16"),
    }
    return bool(native.get(dtype))
