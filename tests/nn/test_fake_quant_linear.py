"""Quantization-aware training: the same numbers as the converted layer, and gradients that train."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qlinear.errors import SchemeError
from qlinear.formats.rounding import choose_qparams, dequantize, quantize
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat
from qlinear.nn import FakeQuantLinear, QLinear, convert, fake_quantize, prepare

W4A8 = Scheme("w4a8-g8", TensorFormat("int4", "group", group_size=8), SCHEMES["w8a8"].activation)
ASYMMETRIC = Scheme(
    "asym", TensorFormat("int4", "channel", symmetric=False), TensorFormat("uint8", "tensor", symmetric=False)
)
TRAINABLE = [
    *(SCHEMES[name] for name in ("w8a8", "w8a8-asym", "w8a8-static", "w8a16", "fp8")),
    W4A8,
    ASYMMETRIC,
]
named = pytest.mark.parametrize("scheme", TRAINABLE, ids=lambda scheme: scheme.name)
FORMATS = [
    TensorFormat("int8", "channel"),
    TensorFormat("int4", "group", group_size=4),
    TensorFormat("int8", "token", symmetric=False),
    TensorFormat("uint8", "tensor", symmetric=False),
    TensorFormat("float8_e4m3fn", "channel"),
    SCHEMES["nvfp4"].weight,
    TensorFormat("int8", "block", block_size=(3, 5)),
]


@given(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 99), clip=st.floats(0.3, 1))
def test_values_are_exactly_those_of_the_codes(fmt: TensorFormat, seed: int, clip: float) -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = choose_qparams(x * clip, fmt)
    expected = dequantize(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt)
    assert torch.equal(fake_quantize(x, scale, zero_point, fmt), expected)


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    fmt = TensorFormat("int4", "channel")
    x = torch.tensor([[-20.0, -8.4, 3.3, 7.4, 9.0]], requires_grad=True)
    fake_quantize(x, torch.ones(1, 1), None, fmt).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_the_gradient_of_the_scale_is_that_of_lsq() -> None:
    fmt = TensorFormat("int4", "channel")
    x, scale = torch.tensor([[-20.0, -3.7, 3.3, 9.0]]), torch.full((1, 1), 2.0, requires_grad=True)
    fake_quantize(x, scale, None, fmt).sum().backward()
    expected = (-8) + (round(-1.85) + 1.85) + (round(1.65) - 1.65) + (round(4.5) - 4.5)
    torch.testing.assert_close(scale.grad, torch.tensor([[expected]]))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_scales_that_a_format_stores_are_not_learned(name: str) -> None:
    with pytest.raises(SchemeError, match=f"learned scales are float32; scheme '{name}' stores float8_e"):
        FakeQuantLinear(32, 8, scheme=name, learn_scale=True)


@pytest.mark.parametrize(
    "scheme",
    [*TRAINABLE, *(SCHEMES[name] for name in ("nvfp4", "mxfp4", "mxfp8"))],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_converted_layer_computes_the_same(scheme: Scheme, learn_scale: bool, bias: bool) -> None:
    if learn_scale and (not scheme.weight.symmetric or scheme.weight.scale_dtype is not None):
        pytest.skip("learned scales are symmetric, and float32")
    torch.manual_seed(0)
    layer = FakeQuantLinear(32, 24, bias, scheme=scheme, learn_scale=learn_scale)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(16, 32)).square().sum().backward()
        optimizer.step()
    x = torch.randn(5, 32)
    expected = layer.eval()(x).detach()
    torch.testing.assert_close(convert(layer)(x), expected, rtol=1e-5, atol=1e-5)


@named
def test_it_keeps_the_contract_of_linear(scheme: Scheme) -> None:
    layer = FakeQuantLinear(32, 24, scheme=scheme)
    plain = nn.Linear(32, 24)
    assert isinstance(layer, nn.Linear)
    assert {name: p.shape for name, p in layer.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()
    }
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.partition("_")[0] for name in missing} <= {"input"}
    layer(torch.randn(4, 32))
    for shape in ((32,), (3, 32), (2, 0, 32), (2, 3, 4, 32)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 24)
    assert copy.deepcopy(layer).state_dict().keys() == layer.state_dict().keys()
    assert layer.to(torch.bfloat16)(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta").weight.is_meta
    with pytest.raises(RuntimeError):
        plain(torch.randn(3, 31))
    with pytest.raises(RuntimeError):
        FakeQuantLinear(32, 24, scheme=scheme)(torch.randn(3, 31))


@named
@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_it_takes_the_state_of_linear_strictly_and_starts_from_it(
    scheme: Scheme, learn_scale: bool, assign: bool
) -> None:
    learn_scale = learn_scale and scheme.weight.symmetric
    plain = nn.Linear(32, 24)
    layer = FakeQuantLinear(32, 24, device="meta" if assign else None, scheme=scheme, learn_scale=learn_scale)
    layer.load_state_dict(plain.state_dict(), assign=assign)
    x = torch.randn(7, 32)
    assert torch.equal(layer(x), FakeQuantLinear.from_float(plain, scheme, learn_scale=learn_scale)(x))
    state = layer.state_dict()
    if "weight_scale" in state:
        del state["weight_scale"]
        if scheme.is_static:
            with pytest.raises(RuntimeError, match="weight_scale"):
                layer.load_state_dict(state)


def test_a_fresh_layer_starts_as_linear_does() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(32, 24)
    torch.manual_seed(3)
    assert torch.equal(FakeQuantLinear(32, 24).weight, plain.weight)


def test_gradients_agree_with_the_float_layers() -> None:
    """The straight-through gradients are those of the float layer at the rounded point."""
    torch.manual_seed(0)
    layer, x = FakeQuantLinear(32, 24), torch.randn(5, 32, requires_grad=True)
    layer(x).square().sum().backward()
    q, w = (fake_quantize(t.detach(), *choose_qparams(t.detach(), f), f)
            for t, f in ((x, layer.scheme.activation), (layer.weight, layer.scheme.weight)))  # fmt: skip
    y = F.linear(q, w, layer.bias)
    torch.testing.assert_close(x.grad, 2 * y @ w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, 2 * y.t() @ q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_from_the_extremes_clip_no_gradient(dtype: torch.dtype) -> None:
    for fmt in FORMATS:
        x = torch.randn(6, 16).to(dtype).requires_grad_()
        fake_quantize(x, *choose_qparams(x.detach(), fmt), fmt).sum().backward()
        assert bool((x.grad == 1).all()), fmt


def test_preparing_keeps_parameters_and_shared_layers() -> None:
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(32, 8)})
    parameters = [id(p) for p in model.parameters()]
    assert prepare(model, "w8a8") is model
    assert [id(p) for p in model.parameters()] == parameters
    assert model["a"] is model["b"][0]
    assert all(type(m) is FakeQuantLinear for m in model.modules() if isinstance(m, nn.Linear))
    convert(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["c"], QLinear)


def test_a_shared_layer_is_replaced_in_both_places() -> None:
    shared = nn.Linear(32, 32)
    model = prepare(nn.Sequential(shared, nn.ReLU(), shared), "w8a8")
    assert type(model[0]) is FakeQuantLinear
    assert model[0] is model[2]
    convert(model)
    assert type(model[0]) is QLinear
    assert model[0] is model[2]


@torch.no_grad()
def test_torchs_encoder_layers_round_in_evaluation_as_in_training() -> None:
    """Their fused operator would use the float weights without rounding."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 32)
    expected = prepare(model, "w4a16-channel")(x)
    torch.testing.assert_close(model.eval()(x), expected)
    torch.testing.assert_close(convert(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_lone_linear_is_prepared_and_converted() -> None:
    linear = nn.Linear(32, 8)
    prepared = prepare(linear, "w8a8")
    assert prepared.weight is linear.weight
    assert isinstance(convert(prepared), QLinear)


def test_a_scheme_that_does_not_fit_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(12, 4))
    with pytest.raises(SchemeError, match="not divisible by group_size 8"):
        prepare(model, W4A8)
    assert type(model[0]) is nn.Linear


def test_a_static_layer_without_data_cannot_be_converted() -> None:
    with pytest.raises(SchemeError, match="run it on data in training mode first"):
        convert(FakeQuantLinear(32, 8, scheme="w8a8-static"))


def test_zero_points_cannot_be_learned() -> None:
    with pytest.raises(SchemeError, match="learned scales are symmetric"):
        FakeQuantLinear(32, 8, scheme=ASYMMETRIC, learn_scale=True)


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Points on two spiral arms: features (count, 16), and the arm of each point (count,)."""
    arm = torch.arange(count) % 2
    angle = torch.rand(count) * 6
    x = torch.stack([angle * (angle + 3.14159 * arm).cos(), angle * (angle + 3.14159 * arm).sin()], 1) / 6
    return torch.cat([f(x * k) for k in (1, 2, 3, 4) for f in (torch.sin, torch.cos)], 1), arm


@pytest.mark.parametrize("learn_scale", [False, True])
def test_a_small_network_learns_from_scratch_in_four_bits(learn_scale: bool) -> None:
    torch.manual_seed(0)
    x, arm = spirals(512)
    model = prepare(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
        W4A8,
        learn_scale=learn_scale,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), arm).backward()
        optimizer.step()
    fresh, expected = spirals(512)
    accuracy = (convert(model)(fresh).argmax(1) == expected).float().mean()
    assert accuracy > 0.95


@settings(max_examples=5)
@given(momentum_batches=st.integers(1, 4))
def test_the_running_range_follows_the_inputs(momentum_batches: int) -> None:
    layer = FakeQuantLinear(8, 4, scheme="w8a8-static")
    for _ in range(momentum_batches):
        layer(torch.linspace(-2, 3, 8).expand(2, 8))
    assert (float(layer.input_low), float(layer.input_high)) == (-2, 3)
    layer.eval()(torch.full((2, 8), 50.0))
    assert float(layer.input_high) == 3
