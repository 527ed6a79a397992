"""`QLinear` keeps the contract of `torch.nn.Linear` wherever a quantized layer can."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlinear.errors import QLinearError, SchemeError
from qlinear.formats.rounding import dequantize, quantize_tensor
from qlinear.formats.scheme import Scheme, TensorFormat, get_scheme
from qlinear.nn import QLinear

from .layers import ALL_SCHEMES, INT8_TOKEN, make_layer, named


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_the_float_layers_up_to_quantization_error(scheme: Scheme, dtype: torch.dtype) -> None:
    linear, layer = make_layer(scheme)
    x = torch.randn(5, 256).clamp(-3, 3).to(dtype)
    error = (layer(x).float() - linear(x.float())).norm() / linear(x.float()).norm()
    assert layer(x).dtype == dtype
    # An e4m3 code has three mantissa bits: each factor's relative error is at most 1/16, and 0.026 on average.
    assert error < {8: 0.05 if scheme.weight.is_float else 0.04, 4: 0.15}[scheme.weight.bits]


@named
def test_it_multiplies_by_the_dequantized_weight(scheme: Scheme) -> None:
    _, layer = make_layer(scheme, migration_scale=torch.rand(256) + 0.5)
    weight = dequantize(layer.weight, layer.weight_scale, layer.weight_zero_point, scheme.weight)
    torch.testing.assert_close(layer.dequantize() * layer.migration_scale, weight)
    x = torch.randn(64, 256).clamp(-3, 3)
    plain = nn.functional.linear(x, layer.dequantize(), layer.bias)
    error = (layer(x) - plain).norm() / plain.norm()
    # Normal e2m1 numbers have an error of at most a fifth of themselves: ¼ of 1¼.
    rounding = 1e-6 if scheme.activation is None else 0.2 if scheme.activation.bits == 4 else 0.03
    assert error < rounding


@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-static"])
def test_the_integer_kernel_equals_the_plain_product(name: str) -> None:
    _, layer = make_layer(name, migration_scale=torch.rand(256) + 0.5)
    x = torch.randn(7, 256)
    torch.testing.assert_close(layer(x), layer._forward_plain(x), rtol=1e-5, atol=1e-5)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scheme=st.sampled_from(ALL_SCHEMES),
)
def test_any_number_of_leading_dimensions(shape: list[int], dtype: torch.dtype, scheme: Scheme) -> None:
    _, layer = make_layer(scheme)
    x = torch.randn(*shape, 256).to(dtype)
    assert layer(x).shape == (*shape, 24)
    if x.numel():
        last = layer(x.reshape(-1, 256)[-1])
        # Other schemes multiply in float, where torch sums a row and a matrix in different orders.
        exact = {"rtol": 0, "atol": 0} if layer._is_integer else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(layer(x).reshape(-1, 24)[-1], last, **exact)


def test_strides_do_not_matter() -> None:
    _, layer = make_layer()
    x = torch.randn(4, 256, 6)
    assert torch.equal(layer(x.transpose(1, 2)), layer(x.transpose(1, 2).contiguous()))
    assert torch.equal(layer(x[:, :, :1].expand(4, 256, 6).mT), layer(x[:, :, :1].mT).expand(4, 6, 24))


def test_the_input_may_be_given_by_name_as_to_linear() -> None:
    linear, layer = make_layer()
    x = torch.randn(3, 256)
    assert linear(input=x).shape == layer(input=x).shape
    assert torch.equal(layer(input=x), layer(x))


def test_a_pair_of_codes_and_scale_skips_quantizing() -> None:
    _, layer = make_layer()
    x = torch.randn(2, 5, 256)
    tokens = quantize_tensor(x, INT8_TOKEN)
    assert torch.equal(layer((tokens.codes, tokens.scale)), layer(x))


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (torch.zeros(2, 256), torch.ones(2, 1)),
        (torch.zeros(2, 256, dtype=torch.uint8), torch.ones(2, 1)),
        (torch.zeros(2, 256, dtype=torch.int8), torch.ones(3, 1)),
        (torch.zeros(2, 256, dtype=torch.int8), torch.ones(2)),
    ],
)
def test_an_invalid_pair_is_refused(codes: Tensor, scale: Tensor) -> None:
    with pytest.raises(QLinearError, match=r"must be int8 codes .* and their scale"):
        make_layer()[1]((codes, scale))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("name", ["w8a8", "w8a8-asym", "w8a8-static", "w8a16", "fp8"])
@pytest.mark.parametrize(("width", "out"), [(0, 4), (4, 0), (0, 0)])
def test_zero_widths_work_as_in_linear(name: str, width: int, out: int) -> None:
    linear, layer = nn.Linear(width, out), QLinear(width, out, scheme=name)
    layer.bias.copy_(linear.bias.detach())
    for shape in ((3, width), (2, 3, width), (width,)):
        assert layer(torch.randn(shape)).shape == linear(torch.randn(shape)).shape
    if width == 0:
        assert torch.equal(layer(torch.randn(3, 0)), linear(torch.randn(3, 0)))


@named
def test_a_meta_layer_is_quantized_on_meta(scheme: Scheme) -> None:
    _, source = make_layer(scheme)
    if scheme.is_static:
        pytest.skip("statistics are data")
    layer = QLinear.from_float(nn.Linear(256, 24, device="meta"), scheme)
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), source(x))


def test_a_pair_is_refused_where_no_integer_kernel_takes_it() -> None:
    _, layer = make_layer("w8a16")
    with pytest.raises(SchemeError, match="'w8a16' takes no codes as input"):
        layer((torch.zeros(2, 256, dtype=torch.int8), torch.ones(2, 1)))


def test_changed_codes_are_used_at_once() -> None:
    _, layer = make_layer()
    x = torch.randn(3, 256)
    layer(x)
    twice = QLinear.from_float(nn.Linear(256, 24), "w8a8")
    layer.load_state_dict(twice.state_dict())
    assert torch.equal(layer(x), twice(x))
    layer.weight = twice.weight.neg()
    assert not torch.equal(layer(x), twice(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 255), r"in_features 256; got shape \(3, 255\)"),
        (torch.tensor(1.0), r"in_features 256; got shape \(\)"),
        (torch.ones(3, 256, dtype=torch.int8), "floating point tensor; got torch.int8"),
        (torch.ones(3, 256, device="meta"), "the input is on meta, the layer on cpu"),
    ],
)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_a_wrong_input_is_refused_naming_expected_and_given(x: Tensor, message: str, scheme: str) -> None:
    _, layer = make_layer(scheme)
    with pytest.raises(QLinearError, match=message):
        layer(x)


def test_static_activations_need_statistics() -> None:
    with pytest.raises(SchemeError, match="stats of the layer's input are needed"):
        QLinear.from_float(nn.Linear(256, 24), "w8a8-static")


def test_codes_in_another_format_are_refused() -> None:
    codes = quantize_tensor(torch.randn(24, 256), TensorFormat("int8", "tensor"))
    with pytest.raises(SchemeError, match="scheme 'w8a8' takes weights as"):
        QLinear.from_quantized(codes, None, "w8a8")


@named
def test_from_quantized_keeps_the_codes(scheme: Scheme) -> None:
    codes = quantize_tensor(torch.randn(24, 256), scheme.weight)
    layer = QLinear.from_quantized(codes, torch.ones(24), scheme, dtype=torch.bfloat16)
    assert layer.weight is codes.codes
    assert torch.equal(layer.dequantize(), codes.dequantize())
    assert layer.bias.dtype == layer.dtype == torch.bfloat16


def test_its_repr_matches_linears() -> None:
    assert (
        repr(QLinear(256, 24, False)) == "QLinear(in_features=256, out_features=24, bias=False, scheme=w8a8)"
    )
    assert QLinear.__constants__[:2] == ("in_features", "out_features")
    assert get_scheme("w8a8") is QLinear(2, 3).scheme
