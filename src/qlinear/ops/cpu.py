"""The integer linear layer on CPUs: oneDNN's int8 product on a weight that is packed once.

oneDNN packs for uint8 activations, which both VNNI and AMX multiply natively, so codes are held here as
`code + 128` with zero point 128. It multiplies the int32 accumulator by the weight scale, as the reference does.
Everything around the product runs over a few rows at a time, so its float32 temporaries stay in a core's cache:
eager operations over whole activations fault in fresh pages on every call, and cost as much as the product.

Where the product is missing or inexact (x86 without VNNI saturates in silence), the reference takes over.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..numerics import scale_from_absmax
from . import reference

# Float32 elements that the caches of two cores hold while a few passes are made over them.
_CHUNK = 1 << 18
# Rows of one product: enough to read the weight few times, few enough for its output to stay in cache.
_PRODUCT_ROWS = 256
# Adding 1.5 · 2²³ to a float32 of small size rounds it, half to even, and leaves the integer in the lowest bits.
_ROUNDING = 1.5 * 2**23
# uint8 codes times int8 weights must fit an int32 sum before the zero point is taken out.
_MAX_IN = 2**31 // (255 * 128)


class _Packed(NamedTuple):
    version: int
    address: int
    weight: Tensor


# What packing gave, by the tensor that holds the codes. An entry goes when its tensor does, and counts only as
# long as the tensor has neither been written to nor moved.
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pack(weight: Tensor) -> Tensor:
    """weight (out, in) int8 → the same codes in the layout that oneDNN multiplies from (opaque)."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def packed_once(weight: Tensor) -> Tensor:
    """`pack(weight)`, remembered for as long as the tensor lives unchanged."""
    # Inference tensors count no versions: those that were packed must not be written to.
    version = -1 if weight.is_inference() else weight._version
    entry: _Packed | None = _packed[weight] if weight in _packed else None  # noqa: SIM401
    if entry is None or (entry.version, entry.address) != (version, weight.data_ptr()):
        entry = _packed[weight] = _Packed(version, weight.data_ptr(), pack(weight))
    return entry.weight


def _product(codes: Tensor, zero_point: int, packed: Tensor, weight_scale: Tensor) -> Tensor:
    """float32((codes - zero_point) · weightᵀ) * weight_scale: codes (M, in) uint8 → (M, out) float32."""
    no_zero_point = torch.zeros(1, dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, packed, weight_scale, no_zero_point,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN's product equals the reference on this processor, tried with the most extreme codes."""
    try:
        return all(_equals_reference(*shape) for shape in ((1, 2113, 80), (33, 2048, 128), (33, 2113, 77)))
    except (AttributeError, RuntimeError):  # no oneDNN in this build, or none for these dtypes
        return False


def _equals_reference(rows: int, width: int, out: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (rows, width), generator=generator).mul(255).to(torch.uint8)
    weight = torch.randint(0, 2, (out, width), generator=generator).mul(255).sub(128).to(torch.int8)
    weight[0], codes[0] = -128, 255
    scale = torch.rand(out, generator=generator)
    return all(
        torch.equal(
            _product(codes, zero, pack(weight), scale),
            (reference.int_matmul(codes, weight) - zero * weight.sum(1, dtype=torch.int32)).float() * scale,
        )
        for zero in (0, 128)
    )


def _is_fast(weight: Tensor) -> bool:
    return 0 < weight.shape[1] <= _MAX_IN and weight.shape[0] > 0 and is_exact()


def _spans(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _load(x: Tensor, migration_scale: Tensor | None, scratch: Tensor) -> Tensor:
    """`x / migration_scale` in float32, in the first rows of `scratch`."""
    rows = scratch[: x.shape[0]].copy_(x)
    return rows if migration_scale is None else rows.div_(migration_scale)


def _store_codes(x: Tensor, zero_point: int, codes: Tensor) -> None:
    """codes = uint8(round(x) + zero_point); x is overwritten."""
    odd = zero_point % 2  # halves go to the even side, so only an even number may be added before rounding
    x.add_(_ROUNDING + zero_point - odd)
    codes.copy_((x.add_(odd) if odd else x).view(torch.int32))


def _quantize_tokens(x: Tensor, migration_scale: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    """Rows of x (M, in) → codes (M, in) uint8 around 128, scale (M, 1)."""
    step = max(1, _CHUNK // x.shape[1])
    scratch = torch.empty(2, min(step, x.shape[0]), x.shape[1])
    for part in _spans(x.shape[0], step):
        rows = _load(x[part], migration_scale, scratch[0])
        absmax = torch.abs(rows, out=scratch[1, : rows.shape[0]]).amax(1, keepdim=True)
        scale[part] = scale_from_absmax(absmax, reference.TOKEN_INT8)
        _store_codes(rows.div_(scale[part]), 128, codes[part])
    # infinity - infinity is NaN: what the reference gives a token that holds one.
    scale += scale - scale


def _quantize_static(
    x: Tensor, migration_scale: Tensor | None, codes: Tensor, input_scale: Tensor, zero_point: int
) -> None:
    """Rows of x (M, in) → codes (M, in) uint8 around `zero_point`, for one scale (1,)."""
    step = max(1, _CHUNK // x.shape[1])
    scratch = torch.empty(min(step, x.shape[0]), x.shape[1])
    for part in _spans(x.shape[0], step):
        rows = _load(x[part], migration_scale, scratch).div_(input_scale)
        # Both ends are whole numbers, so clamping before rounding is the same as after.
        _store_codes(rows.clamp_(-zero_point, 255 - zero_point), zero_point, codes[part])


def _finish(product: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = product * scale + bias, cast; `product` is overwritten."""
    for part in _spans(out.shape[0], max(1, _CHUNK // out.shape[1])):
        y = product[part].mul_(scale[part] if scale.shape[0] > 1 else scale)
        out[part] = y if bias is None else y.add_(bias)


def _linear(
    quantized_rows: Callable[[slice], tuple[Tensor, Tensor]],
    shape: torch.Size,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The layer over blocks of rows; `quantized_rows` gives a block's uint8 codes and scales."""
    packed, channels = packed_once(weight), weight_scale.reshape(-1).expand(weight.shape[0]).contiguous()
    bias = None if bias is None else bias.float()
    out = torch.empty(shape[:-1].numel(), weight.shape[0], dtype=dtype)
    for part in _spans(out.shape[0], _PRODUCT_ROWS):
        codes, scale = quantized_rows(part)
        _finish(_product(codes, zero_point, packed, channels), scale, bias, out[part])
    return out.view(*shape[:-1], weight.shape[0])


def dynamic_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    symmetric: bool,
) -> Tensor:
    """`reference.dynamic_linear`, bit for bit."""
    if not (symmetric and _is_fast(weight)):
        return reference.dynamic_linear(x, weight, weight_scale, migration_scale, bias, symmetric)
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(min(_PRODUCT_ROWS, rows.shape[0]), rows.shape[1], dtype=torch.uint8)

    def quantized_rows(part: slice) -> tuple[Tensor, Tensor]:
        block, scale = codes[: part.stop - part.start], torch.empty(part.stop - part.start, 1)
        _quantize_tokens(rows[part], migration_scale, block, scale)
        return block, scale

    return _linear(quantized_rows, x.shape, 128, weight, weight_scale, bias, x.dtype)


def static_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    migration_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero_point: Tensor | None,
) -> Tensor:
    """`reference.static_linear`, bit for bit."""
    if not _is_fast(weight):
        return reference.static_linear(
            x, weight, weight_scale, migration_scale, bias, input_scale, input_zero_point
        )
    rows, zero_point = x.reshape(-1, x.shape[-1]), _uint8_zero_point(input_zero_point)
    codes = torch.empty(min(_PRODUCT_ROWS, rows.shape[0]), rows.shape[1], dtype=torch.uint8)

    def quantized_rows(part: slice) -> tuple[Tensor, Tensor]:
        block = codes[: part.stop - part.start]
        _quantize_static(rows[part], migration_scale, block, input_scale, zero_point)
        return block, input_scale.view(1, 1)

    return _linear(quantized_rows, x.shape, zero_point, weight, weight_scale, bias, x.dtype)


def _uint8_zero_point(zero_point: Tensor | None) -> int:
    """The zero point of the codes once int8 ones are moved up by 128."""
    if zero_point is None:
        return 128
    return int(zero_point) + (0 if zero_point.dtype == torch.uint8 else 128)


def codes_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.codes_linear`, bit for bit."""
    per_token = zero_point is not None and zero_point.numel() != 1
    if per_token or not _is_fast(weight):
        return reference.codes_linear(codes, scale, zero_point, weight, weight_scale, bias, dtype)
    rows, scales = codes.reshape(-1, codes.shape[-1]).contiguous(), scale.reshape(-1, 1)
    unsigned = rows if rows.dtype == torch.uint8 else rows.view(torch.uint8) ^ 128
    offset = (0 if rows.dtype == torch.uint8 else 128) + (0 if zero_point is None else int(zero_point))

    def quantized_rows(part: slice) -> tuple[Tensor, Tensor]:
        return unsigned[part], scales if scales.shape[0] == 1 else scales[part]

    return _linear(quantized_rows, codes.shape, offset, weight, weight_scale, bias, dtype)
