"""The layer on float inputs: the weight is dequantized in tiles, each just before its product.

A 4096 × 4096 weight takes 64 MB in float32. Dequantized whole, it would be written to memory and read back on every
call, which costs several times the product with one token. So a few rows at a time are dequantized, multiplied and
dropped. Where torch has a product with the 4-bit codes themselves (`torch_int4`), few tokens go there. Its time grows
with every row of input, which the time to dequantize does not.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime.device import has_native_products
from . import reference, torch_int4

# Elements of a tile's float32 copy: enough rows for an efficient product, few enough for the cache.
_TILE = 1 << 20


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
        y = _in_tiles(rows, weight, weight_scale, weight_zero_point, bias)
    else:
        y = reference.weight_only_linear(rows, weight, weight_scale, weight_zero_point, None, bias, bits)
    return y.view(*x.shape[:-1], weight.shape[0])


def _in_tiles(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The layer on x (rows, in), some outputs at a time, in x's dtype if the processor has native products in it."""
    dtype = x.dtype if x.dtype.itemsize > 2 or has_native_products(x.dtype, x.device) else torch.float32
    inputs, out = x.to(dtype), x.new_empty(len(x), len(weight))
    tiles = -(-weight.numel() // _TILE)
    count = -(-len(weight) // max(1, tiles))
    # One buffer for all tiles stays in cache, and its pages are faulted in once.
    single = weight.new_empty(count, weight.shape[1], dtype=torch.float32)
    matrix = single if dtype == torch.float32 else torch.empty_like(single, dtype=dtype)
    for start in range(0, len(weight), max(1, count)):
        part = slice(start, start + count)
        zeros = None if weight_zero_point is None else weight_zero_point[part]
        values = reference.dequantize_into(single, weight[part], weight_scale[part], zeros)
        tile = values if matrix is single else matrix[: len(values)].copy_(values)
        out[:, part] = F.linear(inputs, tile, None if bias is None else bias[part].to(dtype))
    return out
