"""The layer on float inputs: whatever kernel it takes, it multiplies by what the codes stand for."""

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
from qlinear.ops import reference, weight_only
from qlinear.ops import torch_int4 as int4

from ..support.models import save_model

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(not int4.works(CPU), reason="torch has no 4-bit product on this processor")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
HALF, SINGLE = 2.0**-8, 2.0**-24  # half a unit in the last place, of bfloat16 and of float32


class Layer:
    """Random codes in groups, with scales that bfloat16 holds, and an input; the same seed gives the same."""

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
def layers(draw: st.DrawFn) -> Layer:
    tile = draw(st.sampled_from([32, 64, 96, 128, 256, 512]))
    width, out = tile * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 5))
    return Layer(draw(st.integers(1, 64)), width, out, tile, draw(st.booleans()), draw(st.integers(0, 999)))


def limit(layer: Layer) -> Tensor:
    """What rounding the result to bfloat16, summing in float32 and rounding -zero · scale to bfloat16 can do."""
    x, width = layer.x.double().abs(), layer.x.shape[1]
    exact = layer.x.double() @ layer.matrix.double().T
    summed = 2 * width * SINGLE * (x @ (layer.weight.abs() + 16).double().mul(spread(layer, layer.scale)).T)
    if layer.zero_point is None:
        return HALF * (exact.abs() + summed) + summed
    shifts = spread(layer, layer.zero_point.double() * layer.scale).abs()
    return HALF * (exact.abs() + summed + x @ shifts.T) * (1 + 2 * HALF) + summed


def spread(layer: Layer, per_tile: Tensor) -> Tensor:
    return per_tile.double().repeat_interleave(layer.weight.shape[1] // per_tile.shape[1], 1)


@needs_int4
@settings(max_examples=60)
@given(layer=layers())
def test_four_bit_products_are_exact_up_to_the_rounding_of_bfloat16(layer: Layer) -> None:
    assert int4.fits(layer.x, layer.weight, layer.scale)
    error = (layer().double() - layer.x.double() @ layer.matrix.double().T).abs()
    assert bool((error <= limit(layer)).all())


@settings(max_examples=40)
@given(layer=layers(), dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_other_dtypes_are_dequantized_to(layer: Layer, dtype: torch.dtype) -> None:
    assert not int4.fits(layer.x.to(dtype), layer.weight, layer.scale)
    y, exact = layer(layer.x.to(dtype)), layer.x.double() @ layer.matrix.double().T
    assert y.dtype == dtype
    assert float((y - exact).norm() / exact.norm()) < (1e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize(
    ("rows", "width", "out", "tile"),
    [(65, 64, 16, 32), (3, 64, 24, 32), (3, 48, 16, 16), (3, 40, 16, 40), (0, 64, 16, 32), (3, 64, 0, 32)],
)
def test_what_fits_no_kernel_is_dequantized(rows: int, width: int, out: int, tile: int) -> None:
    layer = Layer(rows, width, out, tile, True, 0)
    assert not int4.fits(layer.x, layer.weight, layer.scale)
    exact = layer.x.double() @ layer.matrix.double().T
    torch.testing.assert_close(layer().double(), exact, rtol=2 * HALF, atol=0.1)


@settings(max_examples=25)
@given(
    out=st.integers(1, 30),
    parts=st.integers(1, 3),
    storage=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    chunk=st.integers(1, 1000),
)
def test_a_weight_that_is_dequantized_in_pieces_is_the_whole(
    out: int, parts: int, storage: torch.dtype, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(out)
    weight = torch.randint(-100, 100, (out, 24 * parts), generator=generator).float().to(storage)
    scale, bias = torch.rand(out, parts, generator=generator), torch.randn(out, generator=generator)
    migration = torch.rand(24 * parts, generator=generator) + 0.5
    x = torch.randn(2, 3, 24 * parts, generator=generator)
    arguments = (x, weight, scale, None, migration, bias, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_only, "_CHUNK", chunk)
        found = ops.weight_only_linear(*arguments)
    torch.testing.assert_close(found, reference.weight_only_linear(*arguments), rtol=1e-5, atol=1e-3)


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
def test_the_kernel_errs_at_most_twice_as_much_as_the_plain_way(scheme: Scheme) -> None:
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
    for buffer in [each for each in buffers if each is not None]:
        before = layer(x)
        buffer.copy_(buffer.flip(0))
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), layer._forward_plain(x), rtol=2 * HALF, atol=0.1)


@named
def test_nothing_packed_is_saved_and_all_of_it_goes_with_the_layer(scheme: Scheme) -> None:
    kept = len(int4._packed)
    layer = layer_of(scheme)
    before = {name: buffer.shape for name, buffer in layer.state_dict().items()}
    layer(torch.randn(3, 256).bfloat16())
    assert {name: buffer.shape for name, buffer in layer.state_dict().items()} == before
    assert len(int4._packed) == kept + int4.works(CPU)
    del layer
    assert len(int4._packed) == kept


def test_a_product_that_multiplies_by_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    product = int4._product
    int4.works.cache_clear()
    monkeypatch.setattr(int4, "_product", lambda *args: product(*args) + 1)
    assert not int4.works(CPU)
    monkeypatch.undo()
    int4.works.cache_clear()


@given(out=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_cuda_takes_two_fields_to_a_byte_the_first_in_the_upper_half(out: int, width: int, seed: int) -> None:
    fields = torch.randint(0, 16, (out, 2 * width), generator=torch.Generator().manual_seed(seed))
    assert int4.bytes_of(fields.to(torch.int8)).tolist() == [
        [16 * first + second for first, second in zip(row[::2], row[1::2], strict=True)]
        for row in fields.tolist()
    ]


@settings(max_examples=30)
@given(layer=layers())
def test_cuda_takes_the_shapes_that_fit(layer: Layer) -> None:
    """As far as that can be seen without one: torch checks shapes and dtypes of tensors without data alike."""
    size = int4.group_size(layer.weight, layer.scale)
    given = (layer.x, int4.bytes_of(layer.weight + 8), int4.scale_and_shift(layer.weight, layer.scale))
    assert given[2].shape == (layer.weight.shape[1] // size, layer.weight.shape[0], 2)
    with FakeTensorMode():
        x, fields, pairs = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given)
        packed = int4.pack_on_cuda(fields)
        y = int4._product(x, packed, size, pairs)
    assert (packed.dtype, packed.numel() * 8) == (torch.int32, layer.weight.numel())
    assert (y.shape, y.dtype) == ((len(layer.x), len(layer.weight)), torch.bfloat16)


@needs_cuda
@settings(max_examples=30)
@given(layer=layers())
def test_four_bit_products_on_cuda_are_exact_up_to_the_rounding_of_bfloat16(layer: Layer) -> None:
    assert int4.works(torch.device("cuda"))
    exact, bound = layer.x.double() @ layer.matrix.double().T, limit(layer)
    layer.x, layer.weight, layer.scale = layer.x.cuda(), layer.weight.cuda(), layer.scale.cuda()
    layer.zero_point = None if layer.zero_point is None else layer.zero_point.cuda()
    assert int4.fits(layer.x, layer.weight, layer.scale)
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
    assert int4.works(CPU)  # what is tried once is tried now
    calls, linear = [], int4.linear
    monkeypatch.setattr(int4, "linear", lambda *args: (calls.append(1), linear(*args))[1])
    with torch.no_grad():
        ours = model(ids[:2]).logits
        assert len(calls) == 14
        assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 12)
        monkeypatch.setattr(int4, "works", lambda device: False)
        theirs = model(ids[:2]).logits
    error = float((ours - theirs).float().norm() / theirs.float().norm())
    assert 0 < error < 0.03
