"""Ranges of static activations: what each method covers, and how large its error is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlinear.errors import NumericsError, QLinearError, SchemeError
from qlinear.formats.rounding import dequantize, qparams_from_range, quantize
from qlinear.formats.scheme import Scheme, TensorFormat
from qlinear.functional import quantized_linear
from qlinear.nn import QLinear, input_range

FORMATS = [
    TensorFormat("int8", "tensor"),
    TensorFormat("int8", "tensor", symmetric=False),
    TensorFormat("uint8", "tensor", symmetric=False),
]
METHODS = ["minmax", "percentile", "least_squares"]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def error(x: Tensor, ends: tuple[Tensor, Tensor], fmt: TensorFormat) -> float:
    scale, zero_point = qparams_from_range(ends[0].view(1), ends[1].view(1), fmt)
    codes = quantize(x, scale, zero_point, fmt)
    return float((dequantize(codes, scale, zero_point, fmt) - x).square().sum())


@given(seed=st.integers(0, 99), shift=st.floats(-3, 3), fmt=st.sampled_from(FORMATS))
@settings(max_examples=20)
def test_least_squares_is_never_worse_than_the_full_range(seed: int, shift: float, fmt: TensorFormat) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) ** 3 + shift
    full, best = (input_range(x, fmt, method) for method in ("minmax", "least_squares"))
    assert error(x, best, fmt) <= error(x, full, fmt)


@formats
def test_least_squares_is_better_with_one_outlier(fmt: TensorFormat) -> None:
    # n inputs near zero and one at A: clamping A to c costs (A - c)², full range n (A / steps)² / 12.
    x = torch.cat([torch.randn(300_000), torch.tensor([40.0])])
    full, best = (error(x, input_range(x, fmt, method), fmt) for method in ("minmax", "least_squares"))
    # Measured: 0.39, 0.69 and 0.71 of the error over the whole range, by format.
    assert best < 0.8 * full


@formats
def test_the_full_range_is_that_of_the_sample(fmt: TensorFormat) -> None:
    low, high = input_range(torch.tensor([[-1.0, 3.0], [2.0, 0.5]]), fmt)
    assert (float(low), float(high)) == (-1.0, 3.0)


@given(percentile=st.floats(50.1, 100), seed=st.integers(0, 99), count=st.integers(1, 400))
def test_a_percentile_clamps_at_most_its_share(percentile: float, seed: int, count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    low, high = input_range(x, FORMATS[0], "percentile", percentile)
    assert low == -high
    assert int((x.abs() > high).sum()) <= (1 - percentile / 100) * count
    low, high = input_range(x, FORMATS[1], "percentile", percentile)
    assert int((x < low).sum()) <= (1 - percentile / 100) * count
    assert int((x > high).sum()) <= (1 - percentile / 100) * count


@pytest.mark.parametrize("method", METHODS)
@formats
def test_a_layer_scaled_by_any_method_is_close_to_the_float_layer(method: str, fmt: TensorFormat) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 24), torch.randn(500, 64)
    layer = QLinear(64, 24, scheme=Scheme("static", TensorFormat(), fmt))
    layer.load_state_dict(QLinear.from_float(linear, "w8a8").state_dict(), strict=False)
    layer.set_input_range(*input_range(x, fmt, method))  # type: ignore[arg-type]
    assert (layer.input_zero_point is None) == fmt.symmetric
    assert (layer(x) - linear(x)).norm() < 0.03 * linear(x).norm()


def test_a_chain_of_static_layers_stays_in_codes() -> None:
    torch.manual_seed(0)
    scheme = Scheme("static", TensorFormat(), TensorFormat("uint8", "tensor", symmetric=False))
    first, second = nn.Linear(64, 32), nn.Linear(32, 8)
    x = torch.randn(200, 64)
    one, two = (QLinear(a, b, scheme=scheme) for a, b in ((64, 32), (32, 8)))
    for layer, linear, sample in ((one, first, x), (two, second, first(x))):
        layer.load_state_dict(QLinear.from_float(linear, "w8a8").state_dict(), strict=False)
        layer.set_input_range(*input_range(sample, scheme.activation))
    codes = one.requantized(x, two)
    assert codes.dtype == torch.uint8
    assert torch.equal(two.forward_static(codes), two(one(x)))
    expected = quantized_linear(
        codes, two.weight, two.bias, x_scale=two.input_scale, x_zero_point=two.input_zero_point,
        w_scale=two.weight_scale,
    )  # fmt: skip
    assert torch.equal(two.forward_static(codes), expected)


def test_a_chain_needs_static_layers_without_migration() -> None:
    dynamic = QLinear(64, 32)
    static = QLinear(32, 8, scheme="w8a8-static")
    with pytest.raises(SchemeError, match="'w8a8' has no static input scale"):
        dynamic.requantized(torch.randn(2, 64), static)
    static.migration_scale = torch.ones(32)
    with pytest.raises(SchemeError, match="divides its input by a migration scale"):
        QLinear(64, 32, scheme="w8a8-static").requantized(torch.randn(2, 64), static)


@pytest.mark.parametrize(
    ("sample", "options", "raised", "message"),
    [
        (torch.empty(0, 4), {}, QLinearError, "needs a sample of inputs"),
        (torch.tensor([1.0, float("nan")]), {}, NumericsError, "sample of a layer's input holds 1 NaN"),
        (torch.ones(3), {"method": "guess"}, QLinearError, "method must be .* got 'guess'"),
        (torch.ones(3), {"method": "percentile", "percentile": 50}, QLinearError, r"percentile must lie in"),
    ],
)
def test_invalid_arguments_are_refused(
    sample: Tensor, options: dict[str, object], raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=message):
        input_range(sample, FORMATS[0], **options)  # type: ignore[arg-type]
