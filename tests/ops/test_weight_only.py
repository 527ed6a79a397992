"""The layer on float inputs: every kernel multiplies by the dequantized codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear import ops
from qlinear.formats.scheme import Scheme, TensorFormat
from qlinear.nn import QLinear
from qlinear.ops import reference, torch_int4, weight_only

from .weight_only_layers import (
    CPU,
    HALF,
    SINGLE,
    WeightOnlyLayer,
    layers,
    native_products,
    natively,
    needs_int4,
)


@natively
@settings(max_examples=40)
@given(layer=layers(), dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_other_dtypes_are_dequantized_to(
    layer: WeightOnlyLayer, dtype: torch.dtype, half: torch.dtype | None
) -> None:
    assert not torch_int4.fits(layer.x.to(dtype), layer.weight, layer.scale)
    with native_products(*filter(None, [half])):
        y, exact = layer(layer.x.to(dtype)), layer.x.double() @ layer.matrix.double().T
    assert y.dtype == dtype
    assert float((y - exact).norm() / exact.norm()) < (1e-3 if dtype == torch.float16 else 1e-6)


def dequantized_limit(layer: WeightOnlyLayer, half: torch.dtype | None) -> Tensor:
    """Error bound: rounding the weight to bfloat16 if products are, summing in float32, rounding the result."""
    exact = layer.x.double() @ layer.matrix.double().T
    products = layer.x.double().abs() @ layer.matrix.double().abs().T
    before = 2 * layer.x.shape[1] * SINGLE * products
    if half == torch.bfloat16:
        before = HALF * products + (1 + HALF) * before
    return before + HALF * (exact.abs() + before)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "out", "tile"),
    [(65, 64, 16, 32), (3, 64, 24, 32), (3, 48, 16, 16), (3, 40, 16, 40), (0, 64, 16, 32), (3, 64, 0, 32)],
)
def test_shapes_without_a_kernel_are_dequantized(
    rows: int, width: int, out: int, tile: int, half: torch.dtype | None
) -> None:
    layer = WeightOnlyLayer(rows, width, out, tile, True, 0)
    assert not torch_int4.fits(layer.x, layer.weight, layer.scale)
    with native_products(*filter(None, [half])):
        error = (layer().double() - layer.x.double() @ layer.matrix.double().T).abs()
    assert bool((error <= dequantized_limit(layer, half)).all())


@natively
@settings(max_examples=20)
@given(
    rows=st.integers(1, 200), dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 99)
)
def test_the_error_in_a_half_dtype_is_at_most_twice_that_of_the_reference(
    rows: int, dtype: torch.dtype, seed: int, half: torch.dtype | None
) -> None:
    layer = WeightOnlyLayer(rows, 192, 40, 48, bool(seed % 2), seed)
    x, exact = layer.x.to(dtype), layer.x.double() @ layer.matrix.double().T
    expected = reference.weight_only_linear(x, layer.weight, layer.scale, layer.zero_point, None, None, 4)
    with native_products(*filter(None, [half])):
        error, reference_error = ((y - exact).norm() for y in (layer(x), expected))
    assert error <= 2 * reference_error


@settings(max_examples=25)
@given(
    out=st.integers(1, 30),
    parts=st.integers(1, 3),
    storage=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    tile=st.integers(1, 1000),
)
def test_a_weight_that_is_dequantized_in_pieces_is_the_whole(
    out: int, parts: int, storage: torch.dtype, tile: int
) -> None:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randint(-100, 100, (out, 24 * parts), generator=generator).float().to(storage)
    scale, bias = torch.rand(out, parts, generator=generator), torch.randn(out, generator=generator)
    migration = torch.rand(24 * parts, generator=generator) + 0.5
    x = torch.randn(2, 3, 24 * parts, generator=generator)
    arguments = (x, weight, scale, None, migration, bias, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_only, "_TILE", tile)
        y = ops.weight_only_linear(*arguments)
    torch.testing.assert_close(y, reference.weight_only_linear(*arguments), rtol=1e-5, atol=1e-3)


GROUPS = TensorFormat("int4", "group", group_size=32)
SCHEMES = [
    Scheme("w4a16", GROUPS),
    Scheme("w4a16-asym", TensorFormat("int4", "group", group_size=32, symmetric=False)),
    Scheme("w4a16-channel", TensorFormat("int4", "channel")),
    Scheme("w4a8", GROUPS, TensorFormat("int8", "token", dynamic=True)),
    Scheme("w4a8-asym", GROUPS, TensorFormat("int8", "token", symmetric=False, dynamic=True)),
]
named = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def layer_of(scheme: Scheme) -> QLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 48).bfloat16()
    return QLinear.from_float(linear, scheme, migration_scale=torch.rand(256) + 0.5)


@needs_int4
@named
def test_the_kernels_error_is_at_most_twice_that_of_the_plain_product(scheme: Scheme) -> None:
    layer = layer_of(scheme)
    x = torch.randn(40, 256).bfloat16()
    exact = layer._forward_plain(x.double()) if scheme.activation is None else layer._forward_plain(x.float())
    kernel, plain = ((y.double() - exact.double()).norm() for y in (layer(x), layer._forward_plain(x)))
    assert kernel <= 2 * plain
    assert not torch.equal(layer(x), layer._forward_plain(x))


@named
def test_the_gradient_of_the_input_is_the_float_layers(scheme: Scheme) -> None:
    layer, x = layer_of(scheme), torch.randn(3, 256).bfloat16().requires_grad_()
    layer(x).sum().backward()
    expected = torch.ones(3, 48) @ layer.dequantize()
    torch.testing.assert_close(x.grad, expected.bfloat16())


@named
def test_changed_codes_and_scales_are_used_at_once(scheme: Scheme) -> None:
    layer, x = layer_of(scheme), torch.eye(256)[:3].bfloat16() * 64
    buffers = [layer.weight, layer.weight_scale, layer.weight_zero_point]
    for buffer in [tensor for tensor in buffers if tensor is not None]:
        before = layer(x)
        buffer.copy_(buffer.flip(0))
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), layer._forward_plain(x), rtol=2 * HALF, atol=0.1)


@named
def test_packed_weights_are_not_saved_and_are_dropped_with_the_layer(scheme: Scheme) -> None:
    cached = len(torch_int4._packed)
    layer = layer_of(scheme)
    before = {name: buffer.shape for name, buffer in layer.state_dict().items()}
    layer(torch.randn(3, 256).bfloat16())
    assert {name: buffer.shape for name, buffer in layer.state_dict().items()} == before
    assert len(torch_int4._packed) == cached + torch_int4.works(CPU)
    del layer
    assert len(torch_int4._packed) == cached
