"""Torch's products of bfloat16 inputs with 4-bit weights in groups, on a weight that is packed once.

Both kernels, for CPUs and for CUDA, take unsigned fields and a pair (scale, shift) per group, and multiply by

    w = (field - 8) · scale + shift        field = code + 8,   shift = -zero_point · scale

They sum in float32 and round to bfloat16. Their packed layouts differ and are opaque. `scale` and `shift` are bfloat16,
as in a bfloat16 checkpoint. The kernels are private to torch, so they are compared with the plain product before they
are used.
"""

import functools

import torch
from torch import Tensor

from ..formats.rounding import dequantize
from ..formats.scheme import TensorFormat
from ..runtime.device import has_native_products
from .pack_cache import PackCache

GROUP_SIZES = (256, 128, 64, 32)
# The kernels' time is proportional to the rows of input, the time to dequantize a weight is constant. The most rows for
# which the kernel is faster, on two cores with 4096 x 4096 and 2048 x 5632: 38 to 43 with native bfloat16 products.
_MAX_ROWS = 64
_MAX_ROWS_NATIVE = 40
# `out` must be a multiple of this.
_OUTPUTS = {"cpu": 16, "cuda": 8}
_CUDA_TILES = (8, 4, 2)  # of 16 input channels each

_packed = PackCache()


def fits(x: Tensor, weight: Tensor, weight_scale: Tensor) -> bool:
    """Whether the kernel of its device takes x (rows, in), codes (out, in) and scales (out, groups)."""
    out, width = weight.shape
    if x.dtype != torch.bfloat16 or not 0 < len(x) <= max_rows(x.device) or not weight.numel():
        return False
    if group_size(weight, weight_scale) is None or x.device.type not in _OUTPUTS:
        return False
    return out % _OUTPUTS[x.device.type] == 0 and width % 32 == 0 and works(x.device)


def max_rows(device: torch.device) -> int:
    """The most rows for which the kernel is faster than dequantizing the weight."""
    is_native = device.type == "cpu" and has_native_products(torch.bfloat16, device)
    return _MAX_ROWS_NATIVE if is_native else _MAX_ROWS


def group_size(weight: Tensor, weight_scale: Tensor) -> int | None:
    """The largest group size of the kernels that divides the groups of codes (out, in) with scales (out, groups)."""
    tile = weight.shape[1] // weight_scale.shape[1]
    return next((size for size in GROUP_SIZES if tile % size == 0), None)


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None) -> Tensor:
    """x Wᵀ (rows, out) bfloat16, of x (rows, in) bfloat16 and codes (out, in) int8 that `fits`."""
    size = group_size(weight, weight_scale)
    assert size is not None  # fits() was true
    grid = (weight_scale,) if weight_zero_point is None else (weight_scale, weight_zero_point)
    packed, pairs = _packed.get(lambda: (pack(weight), scale_and_shift(weight, *grid)), weight, *grid)
    return _product(x.contiguous(), packed, size, pairs)


def pack(weight: Tensor) -> Tensor:
    """Codes (out, in) int8, each in -8 ... 7, in the layout of the device's kernel."""
    fields = weight + 8
    if weight.device.type == "cuda":
        return pack_on_cuda(bytes_of(fields))
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(fields.int(), 1)
    return packed


def pack_on_cuda(fields: Tensor) -> Tensor:
    """Two fields per byte, uint8 (out, in / 2), in CUDA's opaque int32 layout."""
    tiles = next(tiles for tiles in _CUDA_TILES if fields.shape[1] % (8 * tiles) == 0)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(fields, tiles)
    return packed


def bytes_of(fields: Tensor) -> Tensor:
    """Fields (out, in), 0 ... 15, packed two per byte with the first in the upper half: uint8 (out, in / 2)."""
    unsigned = fields.to(torch.uint8)
    return unsigned[:, ::2] << 4 | unsigned[:, 1::2]


def scale_and_shift(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The pairs (in / size, out, 2) bfloat16 from scales and zero points (out, groups), for the kernels' group size."""
    size = group_size(weight, scale)
    assert size is not None
    shift = torch.zeros_like(scale) if zero_point is None else -zero_point.float() * scale
    pairs = torch.stack((scale, shift), dim=-1).repeat_interleave(
        weight.shape[1] // scale.shape[1] // size, dim=1
    )
    return pairs.transpose(0, 1).to(torch.bfloat16).contiguous()


def _product(x: Tensor, packed: Tensor, size: int, pairs: Tensor) -> Tensor:
    on_cpu, on_cuda = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.ops.aten._weight_int4pack_mm
    y: Tensor = (on_cpu if x.device.type == "cpu" else on_cuda)(x, packed, size, pairs)
    return y


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the device's kernel computes the documented product, tested on every code and zero point."""
    fmt = TensorFormat("int4", "group", group_size=32, symmetric=False)
    codes = (torch.arange(32 * 64, device="cpu").view(32, 64) % 16 - 8).to(torch.int8)
    zero = (torch.arange(64, device="cpu").view(32, 2) % 16 - 8).to(torch.int8)
    scale = 2.0 ** (torch.arange(64, device="cpu").view(32, 2) % 5 - 2)
    x = torch.eye(64, dtype=torch.bfloat16, device="cpu")
    try:
        y = linear(x.to(device), codes.to(device), scale.to(device), zero.to(device))
    except (AttributeError, NotImplementedError, RuntimeError):  # this build or device lacks the kernel
        return False
    return torch.equal(y.float().cpu(), dequantize(codes, scale, zero, fmt).T)
