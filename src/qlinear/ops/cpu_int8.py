"""The integer linear layer on CPUs: oneDNN's int8 product on a weight that is packed once.

oneDNN packs for uint8 activations, which both VNNI and AMX multiply natively, so codes are held here as
`code + 128` with zero point 128. It multiplies the int32 accumulator by the weight scale, as the reference does.
Everything around the product runs over a few rows at a time, so its float32 temporaries stay in a core's cache:
eager operations over whole activations fault in fresh pages on every call, and cost as much as the product.

Where the product is missing or inexact (x86 without VNNI saturates in silence), the reference takes over.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.rounding import scale_from_absmax
from . import reference
from .pack_cache import Memory

# Float32 elements that the caches of two cores hold while a few passes are made over them. Temporaries of this
# size come back from malloc still warm, so nothing is gained by managing buffers here.
_CHUNK = 1 << 18
# Rows of one product: enough to read the weight few times, few enough for its output to stay in cache.
_PRODUCT_ROWS = 512
_NO_ZERO_POINT = torch.zeros(1, dtype=torch.int32, device="cpu")
_POINTWISE = getattr(torch.ops.onednn, "qlinear_pointwise", None)  # None in builds without oneDNN
# Adding 1.5 · 2²³ to a float32 of small size rounds it, half to even, and leaves the integer in the lowest bits.
_ROUNDING = 1.5 * 2**23
_ROUNDING_TO_128 = torch.tensor(
    _ROUNDING + 128, device="cpu"
)  # wrapping the number costs as much as adding it
# uint8 codes times int8 weights must fit an int32 sum before the zero point is taken out.
_MAX_IN = 2**31 // (255 * 128)


_packed = Memory()


def pack(weight: Tensor) -> Tensor:
    """weight (out, in) int8 → the same codes in the layout that oneDNN multiplies from (opaque)."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def packed_once(weight: Tensor) -> Tensor:
    """`pack(weight)`, remembered for as long as the tensor lives unchanged."""
    return _packed.get(lambda: pack(weight), weight)


def _product(codes: Tensor, zero_point: int, packed: Tensor, weight_scale: Tensor) -> Tensor:
    """float32((codes - zero_point) · weightᵀ) * weight_scale: codes (M, in) uint8 → (M, out) float32."""
    assert _POINTWISE is not None  # is_exact() said so
    y: Tensor = _POINTWISE.default(
        codes, 1.0, zero_point, packed, weight_scale, _NO_ZERO_POINT,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN's product equals the reference on this processor, tried with the most extreme codes."""
    try:
        return all(_equals_reference(*shape) for shape in ((1, 2113, 80), (33, 2048, 128), (33, 2113, 77)))
    except (
        AssertionError,
        AttributeError,
        RuntimeError,
    ):  # no oneDNN in this build, or none for these dtypes
        return False


def _equals_reference(rows: int, width: int, out: int) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.rand, generator=generator, device="cpu")
    codes = torch.where(draw(rows, width) < 0.5, 0, 255).to(torch.uint8)
    weight = torch.where(draw(out, width) < 0.5, -128, 127).to(torch.int8)
    weight[0], codes[0], scale = -128, 255, draw(out)
    return all(
        torch.equal(
            _product(codes, zero, pack(weight), scale),
            (reference.int_matmul(codes, weight) - zero * weight.sum(1, dtype=torch.int32)).float() * scale,
        )
        for zero in (0, 128)
    )


def _is_fast(weight: Tensor) -> bool:
    return 0 < weight.shape[1] <= _MAX_IN and weight.shape[0] > 0 and is_exact()


def _blocks(rows: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, `rows` rows of each at a time."""
    if tensors[0].shape[0] <= rows:
        return [tensors]
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def blocks_in_cache(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors (*, n) as matrices; on CPUs, so many rows of each at a time that float32 copies stay in cache."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    count = max(1, _CHUNK // max(1, rows[0].shape[1])) if rows[0].is_cpu else max(1, rows[0].shape[0])
    return _blocks(count, *rows)


def rounded(x: Tensor, zero_point: int) -> Tensor:
    """round(x) + zero_point in the lowest bits of int32, where that is small; x (*) float32 is overwritten."""
    if zero_point == 128:
        return x.add_(_ROUNDING_TO_128).view(torch.int32)
    # Halves go to the even side, so only an even number may be added before rounding.
    odd = zero_point % 2
    return x.add_(_ROUNDING + zero_point - odd).add_(odd).view(torch.int32)


def _quantize_tokens(x: Tensor, migration_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of x (M, in) → codes (M, in) uint8 around 128, scale (M, 1)."""
    values = reference.migrate(x, migration_scale)
    scale = scale_from_absmax(values.abs().amax(1, keepdim=True), reference.TOKEN_INT8)
    return rounded(values / scale, 128).to(torch.uint8), scale


def _quantize_static(
    x: Tensor, migration_scale: Tensor | None, input_scale: Tensor, zero_point: int
) -> tuple[Tensor, Tensor]:
    """Rows of x (M, in) → codes (M, in) uint8 around `zero_point`, the scale (1,) they share."""
    values = reference.migrate(x, migration_scale) / input_scale
    # Both ends are whole numbers, so clamping before rounding is the same as after.
    return rounded(values.clamp_(-zero_point, 255 - zero_point), zero_point).to(torch.uint8), input_scale


# Float32 results (M, out), which it may overwrite, → what is written into the output.
_Finish = Callable[[Tensor], Tensor]


class _Weight(NamedTuple):
    packed: Tensor
    scale: Tensor  # (out,)
    bias: Tensor | None
    rows: int  # of input or output that stay in cache


def _prepare(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> _Weight:
    scale = weight_scale.reshape(-1)
    if scale.shape[0] != weight.shape[0]:
        scale = scale.expand(weight.shape[0]).contiguous()
    rows = max(1, _CHUNK // max(weight.shape))
    return _Weight(packed_once(weight), scale, None if bias is None else bias.float(), rows)


def _scaled(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """product * scale + bias, in place."""
    product.mul_(scale)
    return product if bias is None else product.add_(bias)


def _multiply(
    codes: Tensor, zero_point: int, scales: Iterable[Tensor], weight: _Weight, out: Tensor, finish: _Finish
) -> None:
    """out (M, out) = finish(product * scale + bias); `scales` has one tensor for every `weight.rows` rows."""
    product = _product(codes, zero_point, weight.packed, weight.scale)
    for (values, y), scale in zip(_blocks(weight.rows, product, out), scales, strict=True):
        y.copy_(finish(_scaled(values, scale, weight.bias)))


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _linear(
    x: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], zero_point: int, weight: _Weight
) -> Tensor:
    """The layer on x (*, in); `quantize` makes codes and their scale of a few rows."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= weight.rows:
        # Nothing to cut up. At one token what surrounds the product is all overhead, so it is kept to a line.
        codes, scale = quantize(rows)
        product = _product(codes, zero_point, weight.packed, weight.scale)
        return _scaled(product, scale, weight.bias).to(x.dtype).view(*x.shape[:-1], len(weight.scale))
    out = x.new_empty(len(rows), len(weight.scale))
    for block, block_out in _blocks(_PRODUCT_ROWS, rows, out):
        codes, scales = block.new_empty(block.shape, dtype=torch.uint8), []
        for part, part_codes in _blocks(weight.rows, block, codes):
            part_in_cache, scale = quantize(part)
            part_codes.copy_(part_in_cache)
            scales.append(scale)
        _multiply(codes, zero_point, scales, weight, block_out, _as_it_is)
    return out.view(*x.shape[:-1], len(weight.scale))


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

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _quantize_tokens(rows, migration_scale)

    return _linear(x, quantize, 128, _prepare(weight, weight_scale, bias))


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
    zero_point = 128 if input_zero_point is None else int(input_zero_point) + _offset(input_zero_point.dtype)

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _quantize_static(rows, migration_scale, input_scale, zero_point)

    return _linear(x, quantize, zero_point, _prepare(weight, weight_scale, bias))


def _offset(dtype: torch.dtype) -> int:
    """What turns a code of this dtype into the uint8 code that oneDNN is given."""
    return 0 if dtype == torch.uint8 else 128


def _codes_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: _Weight,
    dtype: torch.dtype,
    finish: _Finish,
) -> Tensor:
    """The layer over blocks of codes (*, in), in `dtype` as `finish` leaves it."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    unsigned = rows if rows.dtype == torch.uint8 else rows.view(torch.uint8) ^ 128
    zero = _offset(codes.dtype) + (0 if zero_point is None else int(zero_point))
    out = codes.new_empty(len(rows), len(weight.scale), dtype=dtype)
    scales = scale.reshape(-1, 1).expand(len(rows), 1)
    for block, block_scale, block_out in _blocks(_PRODUCT_ROWS, unsigned, scales, out):
        _multiply(block, zero, torch.split(block_scale, weight.rows), weight, block_out, finish)
    return out.view(*codes.shape[:-1], out.shape[1])


def _takes(zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None) -> bool:
    """Whether oneDNN has the product: one zero point for all codes, none for weights."""
    return weight_zero_point is None and (zero_point is None or zero_point.numel() == 1) and _is_fast(weight)


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
    """`reference.codes_linear`, bit for bit."""
    if not _takes(zero_point, weight, weight_zero_point):
        return reference.codes_linear(
            codes, scale, zero_point, weight, weight_scale, weight_zero_point, bias, dtype
        )
    return _codes_linear(codes, scale, zero_point, _prepare(weight, weight_scale, bias), dtype, _as_it_is)


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
    """`reference.requantized_linear`, bit for bit."""
    if not _takes(zero_point, weight, weight_zero_point):
        return reference.requantized_linear(
            codes, scale, zero_point, weight, weight_scale, weight_zero_point, bias, out_scale, out_zero_point
        )
    low, high = torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max
    zero = int(out_zero_point)

    def codes_of(values: Tensor) -> Tensor:
        # Whole numbers bound the range, so clamping first is the same; the lowest byte is the code, signed or not.
        return rounded(values.div_(out_scale).clamp_(low - zero, high - zero), zero)

    return _codes_linear(
        codes, scale, zero_point, _prepare(weight, weight_scale, bias), codes.dtype, codes_of
    )


def prepack(weight: Tensor) -> None:
    """Pack a weight now, so that the first call need not."""
    if _is_fast(weight):
        packed_once(weight)
