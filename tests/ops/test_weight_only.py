"""The layer on float inputs: every kernel multiplies by the dequantized codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qlinear
from qlinear import ops
from qlinear.formats.scheme import Scheme, TensorFormat
from qlinear.nn import QLinear
from qlinear.ops import reference, torch_int4, weight_only

from ..support.models import save_model

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(
    not torch_int4.works(CPU), reason="torch has no 4-bit product on this processor"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
HALF, SINGLE = 2.0**-8, 2.0**-24  # half a unit in the last place, of bfloat16 and of float32


class WeightOnlyLayer:
    """Random codes in groups, scales that are bfloat16 numbers, and an input, all determined by the seed."""

    def __init__(self, rows: int, width: int, out: int, tile: int, asymmetric: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, width, generator=generator).bfloat16()
        self.weight = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
        scale = 10.0 ** (2 * torch.rand(out, width // tile, generator=generator) - 2)
        self.scale = scale.bfloat16().float()
        zeros = torch.randint(-8, 8, self.scale.shape, generator=generator, dtype=torch.int8)
        self.zero_point = zeros if asymmetric else None

    @property
    def matrix(self) -> Tensor:
        return reference.dequantized(self.weight, self.scale, self.zero_point)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return ops.weight_only_linear(x, self.weight, self.scale, self.zero_point, None, None, 4)


@st.composite
def layers(draw: st.DrawFn) -> WeightOnlyLayer:
    tile = draw(st.sampled_from([32, 64, 96, 128, 256, 512]))
    width, out = tile * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 5))
    return WeightOnlyLayer(
        draw(st.integers(1, 64)), width, out, tile, draw(st.booleans()), draw(st.integers(0, 999))
    )


def limit(layer: WeightOnlyLayer) -> Tensor:
    """Error bound: rounding the result to bfloat16, summing in float32, rounding -zero · scale to bfloat16."""
    x, width = layer.x.double().abs(), layer.x.shape[1]
    exact = layer.x.double() @ layer.matrix.double().T
    summed = 2 * width * SINGLE * (x @ (layer.weight.abs() + 16).double().mul(spread(layer, layer.scale)).T)
    if layer.zero_point is None:
        return HALF * (exact.abs() + summed) + summed
    shifts = spread(layer, layer.zero_point.double() * layer.scale).abs()
    return HALF * (exact.abs() + summed + x @ shifts.T) * (1 + 2 * HALF) + summed


def spread(layer: WeightOnlyLayer, per_tile: Tensor) -> Tensor:
    return per_tile.double().repeat_interleave(layer.weight.shape[1] // per_tile.shape[1], 1)


@contextmanager
def native_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Context manager: the layer computes as on a processor with native products in these half dtypes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (weight_only, torch_int4):
            patch.setattr(module, "has_native_products", lambda dtype, device: dtype in dtypes)
        yield


@needs_int4
@settings(max_examples=60)
@given(layer=layers())
def test_four_bit_products_are_exact_up_to_the_rounding_of_bfloat16(layer: WeightOnlyLayer) -> None:
    with native_products():  # where the kernel takes the most rows
        assert torch_int4.fits(layer.x, layer.weight, layer.scale)
        error = (layer().double() - layer.x.double() @ layer.matrix.double().T).abs()
    assert bool((error <= limit(layer)).all())


@needs_int4
@pytest.mark.parametrize(("native", "most"), [((), 64), ((torch.bfloat16,), 40)])
def test_more_rows_than_pay_off_are_dequantized(native: tuple[torch.dtype, ...], most: int) -> None:
    with native_products(*native):
        for rows in (most, most + 1):
            layer = WeightOnlyLayer(rows, 64, 16, 32, False, 0)
            assert torch_int4.fits(layer.x, layer.weight, layer.scale) == (rows == most)


# The half dtypes that a processor multiplies natively; products in the others are computed in float32.
natively = pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])


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


def test_a_wrong_product_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch_int4._product
    torch_int4.works.cache_clear()
    monkeypatch.setattr(torch_int4, "_product", lambda *args: product(*args) + 1)
    assert not torch_int4.works(CPU)
    monkeypatch.undo()
    torch_int4.works.cache_clear()


@given(out=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_cuda_packs_two_fields_per_byte_the_first_in_the_upper_half(out: int, width: int, seed: int) -> None:
    fields = torch.randint(0, 16, (out, 2 * width), generator=torch.Generator().manual_seed(seed))
    assert torch_int4.bytes_of(fields.to(torch.int8)).tolist() == [
        [16 * first + second for first, second in zip(row[::2], row[1::2], strict=True)]
        for row in fields.tolist()
    ]


@settings(max_examples=30)
@given(layer=layers())
def test_cuda_takes_the_shapes_that_fit(layer: WeightOnlyLayer) -> None:
    """Checked on fake tensors: torch checks their shapes and dtypes as it does on a GPU."""
    size = torch_int4.group_size(layer.weight, layer.scale)
    arguments = (
        layer.x,
        torch_int4.bytes_of(layer.weight + 8),
        torch_int4.scale_and_shift(layer.weight, layer.scale),
    )
    assert arguments[2].shape == (layer.weight.shape[1] // size, layer.weight.shape[0], 2)
    with FakeTensorMode():
        x, fields, pairs = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in arguments)
        packed = torch_int4.pack_on_cuda(fields)
        y = torch_int4._product(x, packed, size, pairs)
    assert (packed.dtype, packed.numel() * 8) == (torch.int32, layer.weight.numel())
    assert (y.shape, y.dtype) == ((len(layer.x), len(layer.weight)), torch.bfloat16)


@needs_cuda
@settings(max_examples=30)
@given(layer=layers())
def test_four_bit_products_on_cuda_are_exact_up_to_the_rounding_of_bfloat16(layer: WeightOnlyLayer) -> None:
    assert torch_int4.works(torch.device("cuda"))
    exact, bound = layer.x.double() @ layer.matrix.double().T, limit(layer)
    layer.x, layer.weight, layer.scale = layer.x.cuda(), layer.weight.cuda(), layer.scale.cuda()
    layer.zero_point = None if layer.zero_point is None else layer.zero_point.cuda()
    assert torch_int4.fits(layer.x, layer.weight, layer.scale)
    assert bool(((layer().cpu().double() - exact).abs() <= bound).all())


@needs_int4
def test_a_loaded_model_multiplies_its_four_bit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    source = save_model(tmp_path / "source", **sizes)
    ids = torch.arange(3, 67).reshape(8, 8)
    qlinear.quantize(source, tmp_path / "out", "w4a16-g32", calibration=ids)
    model = qlinear.load(tmp_path / "out", dtype="bfloat16").eval()
    assert torch_int4.works(CPU)  # the one test of the kernel runs now
    kernel_calls, linear = [], torch_int4.linear
    monkeypatch.setattr(torch_int4, "linear", lambda *args: (kernel_calls.append(1), linear(*args))[1])
    with torch.no_grad():
        with_kernel = model(ids[:2]).logits
        assert len(kernel_calls) == 14
        assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 12)
        monkeypatch.setattr(torch_int4, "works", lambda device: False)
        without_kernel = model(ids[:2]).logits
    error = float((with_kernel - without_kernel).float().norm() / without_kernel.float().norm())
    assert 0 < error < 0.03
