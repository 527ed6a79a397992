"""The integer linear layer on CPUs: quantize some rows, multiply them with oneDNN's int8 product, scale the result.

The product takes uint8 codes, so int8 codes are stored here as `code + 128` with zero point 128. Everything around the
product runs on a few rows at a time, so that float32 temporaries stay in a core's cache. Eager operations on whole
activations would fault in new pages on every call, and cost as much as the product.

Where the product is missing or inexact, the reference computes the layer.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.scales import scale_from_absmax
from . import onednn_product, reference

# Float32 elements that the caches of two cores hold during a few passes. Malloc returns temporaries of this size still
# in cache, so managing buffers here would gain nothing.
_CHUNK = 1 << 18
# Rows of one product: many enough to read the weight rarely, few enough for the output to stay in cache.
_PRODUCT_ROWS = 512
# Adding 1.5 · 2²³ to a small float32 rounds it, half to even, and leaves the integer in the lowest bits.
_ROUNDING = 1.5 * 2**23
_ROUNDING_TO_128 = torch.tensor(
    _ROUNDING + 128, device="cpu"
)  # wrapping the number costs as much as adding it


def _blocks(rows: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, `rows` rows of each at a time."""
    if tensors[0].shape[0] <= rows:
        return [tensors]
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def blocks_in_cache(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors (*, n) as matrices, in blocks of rows; on CPUs, blocks whose float32 copies stay in cache."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    count = max(1, _CHUNK // max(1, rows[0].shape[1])) if rows[0].is_cpu else max(1, rows[0].shape[0])
    return _blocks(count, *rows)


def round_to_int32(x: Tensor, zero_point: int) -> Tensor:
    """round(x) + zero_point in the lowest bits of int32, for small results; x (*) float32 is overwritten."""
    if zero_point == 128:
        return x.add_(_ROUNDING_TO_128).view(torch.int32)
    # Rounding is half to even, so only an even number may be added before it.
    odd = zero_point % 2
    return x.add_(_ROUNDING + zero_point - odd).add_(odd).view(torch.int32)


def _quantize_tokens(x: Tensor, migration_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of x (M, in) → codes (M, in) uint8 around 128, scale (M, 1)."""
    values = reference.migrate(x, migration_scale)
    scale = scale_from_absmax(values.abs().amax(1, keepdim=True), reference.TOKEN_INT8)
    return round_to_int32(values / scale, 128).to(torch.uint8), scale


def _quantize_static(
    x: Tensor, migration_scale: Tensor | None, input_scale: Tensor, zero_point: int
) -> tuple[Tensor, Tensor]:
    """Rows of x (M, in) → codes (M, in) uint8 around `zero_point`, and their common scale (1,)."""
    values = reference.migrate(x, migration_scale) / input_scale
    # Both bounds are integers, so clamping before rounding equals clamping after it.
    return round_to_int32(values.clamp_(-zero_point, 255 - zero_point), zero_point).to(
        torch.uint8
    ), input_scale


# Converts float32 results (M, out) to the output's values; it may overwrite its argument.
_Finish = Callable[[Tensor], Tensor]


class _PackedWeight(NamedTuple):
    packed: Tensor
    scale: Tensor  # (out,)
    bias: Tensor | None
    rows: int  # of input or output that stay in cache


def _prepare(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> _PackedWeight:
    scale = weight_scale.reshape(-1)
    if scale.shape[0] != weight.shape[0]:
        scale = scale.expand(weight.shape[0]).contiguous()
    rows = max(1, _CHUNK // max(weight.shape))
    return _PackedWeight(
        onednn_product.packed_once(weight), scale, None if bias is None else bias.float(), rows
    )


def _scaled(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """product * scale + bias, in place."""
    product.mul_(scale)
    return product if bias is None else product.add_(bias)


def _multiply(
    codes: Tensor,
    zero_point: int,
    scales: Iterable[Tensor],
    weight: _PackedWeight,
    out: Tensor,
    finish: _Finish,
) -> None:
    """out (M, out) = finish(product * scale + bias); `scales` has one tensor for every `weight.rows` rows."""
    product = onednn_product.product(codes, zero_point, weight.packed, weight.scale)
    for (values, y), scale in zip(_blocks(weight.rows, product, out), scales, strict=True):
        y.copy_(finish(_scaled(values, scale, weight.bias)))


def _identity(values: Tensor) -> Tensor:
    return values


def _linear(
    x: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], zero_point: int, weight: _PackedWeight
) -> Tensor:
    """The layer on x (*, in); `quantize` returns the codes and scale of a few rows."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= weight.rows:
        # One block. With one token, everything around the product is overhead, so it is kept short.
        codes, scale = quantize(rows)
        product = onednn_product.product(codes, zero_point, weight.packed, weight.scale)
        return _scaled(product, scale, weight.bias).to(x.dtype).view(*x.shape[:-1], len(weight.scale))
    out = x.new_empty(len(rows), len(weight.scale))
    for block, block_out in _blocks(_PRODUCT_ROWS, rows, out):
        codes, scales = block.new_empty(block.shape, dtype=torch.uint8), []
        for part, part_codes in _blocks(weight.rows, block, codes):
            part_in_cache, scale = quantize(part)
            part_codes.copy_(part_in_cache)
            scales.append(scale)
        _multiply(codes, zero_point, scales, weight, block_out, _identity)
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
    if not (symmetric and onednn_product.is_usable(weight)):
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
    if not onednn_product.is_usable(weight):
        return reference.static_linear(
            x, weight, weight_scale, migration_scale, bias, input_scale, input_zero_point
        )
    zero_point = 128 if input_zero_point is None else int(input_zero_point) + _offset(input_zero_point.dtype)

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _quantize_static(rows, migration_scale, input_scale, zero_point)

    return _linear(x, quantize, zero_point, _prepare(weight, weight_scale, bias))


def _offset(dtype: torch.dtype) -> int:
    """The difference between oneDNN's uint8 code and a code of this dtype."""
    return 0 if dtype == torch.uint8 else 128


def _codes_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: _PackedWeight,
    dtype: torch.dtype,
    finish: _Finish,
) -> Tensor:
    """The layer over blocks of codes (*, in); `finish` converts the float32 results, which are stored in `dtype`."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    unsigned = rows if rows.dtype == torch.uint8 else rows.view(torch.uint8) ^ 128
    zero = _offset(codes.dtype) + (0 if zero_point is None else int(zero_point))
    out = codes.new_empty(len(rows), len(weight.scale), dtype=dtype)
    scales = scale.reshape(-1, 1).expand(len(rows), 1)
    for block, block_scale, block_out in _blocks(_PRODUCT_ROWS, unsigned, scales, out):
        _multiply(block, zero, torch.split(block_scale, weight.rows), weight, block_out, finish)
    return out.view(*codes.shape[:-1], out.shape[1])


def _is_supported(zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None) -> bool:
    """Whether oneDNN has the product: one zero point for all codes, and none for weights."""
    return (
        weight_zero_point is None
        and (zero_point is None or zero_point.numel() == 1)
        and onednn_product.is_usable(weight)
    )


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
    if not _is_supported(zero_point, weight, weight_zero_point):
        return reference.codes_linear(
            codes, scale, zero_point, weight, weight_scale, weight_zero_point, bias, dtype
        )
    return _codes_linear(codes, scale, zero_point, _prepare(weight, weight_scale, bias), dtype, _identity)


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
    if not _is_supported(zero_point, weight, weight_zero_point):
        return reference.requantized_linear(
            codes, scale, zero_point, weight, weight_scale, weight_zero_point, bias, out_scale, out_zero_point
        )
    low, high = torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max
    zero = int(out_zero_point)

    def codes_of(values: Tensor) -> Tensor:
        # The bounds are integers, so clamping may come first. The lowest byte is the code, signed or unsigned.
        return round_to_int32(values.div_(out_scale).clamp_(low - zero, high - zero), zero)

    return _codes_linear(
        codes, scale, zero_point, _prepare(weight, weight_scale, bias), codes.dtype, codes_of
    )


def prepack(weight: Tensor) -> None:
    """Pack a weight now instead of on the first call."""
    if onednn_product.is_usable(weight):
        onednn_product.packed_once(weight)
