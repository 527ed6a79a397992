"""oneDNN's int8 product: the packed layout of a weight, and the test whether the product is exact on this processor.

oneDNN packs weights for uint8 activations, which both VNNI and AMX multiply natively. It multiplies the int32
accumulator by the weight scale, in float32, as the reference does. On x86 without VNNI the sums saturate silently; so
the product is compared with the reference once, on the most extreme codes, before it is used.
"""

import functools

import torch
from torch import Tensor

from . import reference
from .pack_cache import PackCache

_NO_ZERO_POINT = torch.zeros(1, dtype=torch.int32, device="cpu")
_POINTWISE = getattr(torch.ops.onednn, "qlinear_pointwise", None)  # None in builds without oneDNN
# The sum of products of uint8 codes and int8 weights must fit int32 before the zero point is subtracted.
_MAX_IN = 2**31 // (255 * 128)

_packed = PackCache()


def pack(weight: Tensor) -> Tensor:
    """weight (out, in) int8 → the same codes in the layout that oneDNN multiplies from (opaque)."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def packed_once(weight: Tensor) -> Tensor:
    """`pack(weight)`, cached while the tensor exists unchanged."""
    return _packed.get(lambda: pack(weight), weight)


def product(codes: Tensor, zero_point: int, packed: Tensor, weight_scale: Tensor) -> Tensor:
    """float32((codes - zero_point) · weightᵀ) * weight_scale: codes (M, in) uint8 → (M, out) float32."""
    assert _POINTWISE is not None  # is_exact() was true
    y: Tensor = _POINTWISE.default(
        codes, 1.0, zero_point, packed, weight_scale, _NO_ZERO_POINT,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN's product equals the reference on this processor, tested with the most extreme codes."""
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
            product(codes, zero, pack(weight), scale),
            (reference.int_matmul(codes, weight) - zero * weight.sum(1, dtype=torch.int32)).float() * scale,
        )
        for zero in (0, 128)
    )


def is_usable(weight: Tensor) -> bool:
    """Whether the product takes weight codes (out, in), and is exact."""
    return 0 < weight.shape[1] <= _MAX_IN and weight.shape[0] > 0 and is_exact()
