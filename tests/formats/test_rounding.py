"""Rounding, as properties over random tensors of every format, dtype and size of numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlinear.errors import NumericsError, SchemeError
from qlinear.formats.finite import require_finite
from qlinear.formats.rounding import (
    QuantizedTensor,
    choose_qparams,
    dequantize,
    fake_quantize_input,
    nearest_steps_,
    qparams_from_range,
    quantize,
    quantize_tensor,
)
from qlinear.formats.scales import storable_scale
from qlinear.formats.scheme import SCHEMES, TensorFormat

INTEGER_FORMATS = [
    TensorFormat(dtype, granularity, group_size=group, block_size=block, symmetric=symmetric)  # type: ignore[arg-type]
    for dtype in ("int8", "int4", "uint8")
    for granularity, group, block in (
        ("tensor", None, None),
        ("channel", None, None),
        ("token", None, None),
        ("group", 4, None),
        ("block", None, (3, 5)),
    )
    for symmetric in (True, False)
    if not (symmetric and dtype == "uint8")
]
FLOAT_FORMATS = [
    TensorFormat("float8_e4m3fn", "channel"),
    TensorFormat("float8_e5m2", "tensor"),
    TensorFormat("float8_e4m3fn", "block", block_size=(3, 5)),
]
FORMATS = st.sampled_from(INTEGER_FORMATS)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """(rows, 4n), of any scale that the dtype holds, with rows of zeros and of one sign among them."""
    dtype = draw(DTYPES)
    rows, columns = draw(st.integers(1, 9)), 4 * draw(st.integers(1, 8))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    x *= 10.0 ** draw(st.floats(-3, 3))
    for row in draw(st.sets(st.integers(0, rows - 1))):
        x[row] = draw(st.sampled_from([x[row] * 0, x[row].abs(), -x[row].abs(), x[row].abs() + 1000]))
    return x.to(dtype)


def spread(per_tile: Tensor, fmt: TensorFormat, shape: torch.Size) -> Tensor:
    """The scale of each element, by looking its tile up: another way than the code under test."""
    if per_tile.numel() == 1:
        return per_tile.reshape(1, 1).expand(shape)
    height, width = fmt.tile(shape)
    row, column = torch.arange(shape[0]) // height, torch.arange(shape[1]) // width
    return per_tile[row][:, column]


@given(x=tensors(), fmt=FORMATS)
def test_a_round_trip_is_off_by_at_most_half_a_step(x: Tensor, fmt: TensorFormat) -> None:
    quantized = quantize_tensor(x, fmt)
    step = spread(quantized.scale, fmt, x.shape).double()
    error = (quantized.dequantize().double() - x.double()).abs()
    # int4 divides by 7.5, so the highest code, 7, lies half a step below the greatest value: still half a step.
    rounding = 2**-22 * x.double().abs() + 2**-20 * step
    assert bool((error <= step / 2 + rounding).all())


@given(x=tensors(), fmt=FORMATS)
def test_codes_and_zero_points_stay_in_range_and_scales_have_their_shape(
    x: Tensor, fmt: TensorFormat
) -> None:
    quantized = quantize_tensor(x, fmt)
    low, high = fmt.code_range
    assert quantized.codes.dtype == fmt.storage
    assert quantized.codes.shape == x.shape
    assert low <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= high
    assert quantized.scale.shape == fmt.scale_shape(x.shape)
    assert quantized.scale.dtype == torch.float32
    assert bool((quantized.scale > 0).all())
    assert (quantized.zero_point is None) == fmt.symmetric
    if quantized.zero_point is not None:
        assert quantized.zero_point.shape == quantized.scale.shape
        assert low <= float(quantized.zero_point.min()) <= float(quantized.zero_point.max()) <= high
        assert torch.equal(quantized.zero_point, quantized.zero_point.round())


@given(x=tensors(), fmt=FORMATS)
def test_zero_is_always_exact(x: Tensor, fmt: TensorFormat) -> None:
    x[x.abs() < x.abs().mean()] = 0
    assert not quantize_tensor(x, fmt).dequantize()[x == 0].any()


@given(x=tensors(), fmt=FORMATS)
def test_rounding_is_monotone(x: Tensor, fmt: TensorFormat) -> None:
    scale, zero_point = choose_qparams(x, fmt)
    smaller = quantize(x, scale, zero_point, fmt).int()
    greater = quantize(x.float() + x.float().abs() / 2, scale, zero_point, fmt).int()
    assert bool((greater >= smaller).all())


@given(x=tensors(), fmt=st.sampled_from(INTEGER_FORMATS + FLOAT_FORMATS))
def test_numbers_that_are_codes_already_do_not_move(x: Tensor, fmt: TensorFormat) -> None:
    first = quantize_tensor(x, fmt)
    codes = quantize(first.dequantize(), first.scale, first.zero_point, fmt)
    assert torch.equal(codes.float(), first.codes.float())


@given(x=tensors(), fmt=st.sampled_from(FLOAT_FORMATS))
def test_float_codes_keep_their_relative_precision(x: Tensor, fmt: TensorFormat) -> None:
    quantized = quantize_tensor(x, fmt)
    relative = {"float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}[fmt.dtype]
    finest = {"float8_e4m3fn": 2**-10, "float8_e5m2": 2**-17}[fmt.dtype]
    step = spread(quantized.scale, fmt, x.shape)
    error = (quantized.dequantize() - x.float()).abs()
    assert bool((error <= 1.001 * (relative * x.float().abs() + finest * step)).all())


@given(
    dtype=DTYPES, fmt=st.sampled_from(INTEGER_FORMATS + FLOAT_FORMATS), value=st.sampled_from([0.0, 1e-45])
)
def test_a_tile_of_nothing_has_scale_one_and_decodes_to_zero(
    dtype: torch.dtype, fmt: TensorFormat, value: float
) -> None:
    quantized = quantize_tensor(torch.full((6, 8), value).to(dtype), fmt)
    assert torch.equal(quantized.scale, torch.ones_like(quantized.scale))
    assert not quantized.dequantize().any()


@given(x=tensors(), fmt=FORMATS, scale_dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_scale_is_rounded_to_its_stored_dtype_before_codes_are_chosen(
    x: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype
) -> None:
    quantized = quantize_tensor(x, fmt, scale_dtype=scale_dtype)
    assert torch.equal(quantized.scale, quantized.scale.to(scale_dtype).float())
    again = quantize(x, quantized.scale, quantized.zero_point, fmt)
    assert torch.equal(again, quantized.codes)


def test_a_scale_that_underflows_in_its_stored_dtype_becomes_one() -> None:
    quantized = quantize_tensor(torch.full((2, 8), 1e-6), TensorFormat(), scale_dtype=torch.float16)
    assert torch.equal(quantized.scale, torch.ones(2, 1))
    assert not quantized.codes.any()


def test_an_asymmetric_range_is_widened_to_contain_zero() -> None:
    x = torch.tensor([[1.0, 1.01, 1.02, 1.03]])
    decoded = quantize_tensor(x, TensorFormat("int8", symmetric=False)).dequantize()
    torch.testing.assert_close(decoded, x, atol=1.03 / 255 / 2, rtol=0)


def test_a_row_of_outliers_does_not_touch_the_next_one() -> None:
    x = torch.ones(2, 8)
    x[0] *= 1e6
    assert torch.equal(quantize_tensor(x, TensorFormat()).dequantize()[1], x[1])


def test_halves_are_rounded_to_even() -> None:
    codes = quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), torch.ones(1, 1), None, TensorFormat())
    assert codes.tolist() == [[0, 2, 2, 0, -2]]


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_an_empty_tensor_has_empty_scales(shape: tuple[int, ...]) -> None:
    fmt = TensorFormat("int8", "token", dynamic=True)
    scale, zero_point = choose_qparams(torch.empty(shape), fmt)
    assert scale.shape == fmt.scale_shape(shape)
    assert zero_point is None
    assert quantize(torch.empty(shape), scale, zero_point, fmt).shape == shape


@given(x=tensors(), fmt=FORMATS)
def test_leading_dimensions_are_quantized_one_by_one(x: Tensor, fmt: TensorFormat) -> None:
    if fmt.granularity == "tensor":
        return
    both = quantize_tensor(torch.stack([x, x * 2]), fmt)
    assert torch.equal(both.codes[0], quantize_tensor(x, fmt).codes)
    assert torch.equal(both.scale[1], quantize_tensor(x * 2, fmt).scale)


@pytest.mark.parametrize(
    "fmt",
    [
        TensorFormat("int8", "channel", symmetric=False),
        TensorFormat("int4", "group", group_size=19, symmetric=False),
        TensorFormat("float8_e4m3fn", "group", group_size=27),
    ],
    ids=str,
)
def test_a_weight_of_many_chunks_equals_one_rounded_whole(fmt: TensorFormat) -> None:
    weight = torch.randn(1100, 513)
    scale, zero_point = choose_qparams(weight, fmt)
    chunked = quantize_tensor(weight, fmt)
    assert torch.equal(chunked.codes, quantize(weight, scale, zero_point, fmt))
    assert torch.equal(chunked.scale, scale)
    if zero_point is not None:
        assert torch.equal(chunked.zero_point, zero_point)  # type: ignore[arg-type]


@given(x=tensors())
def test_the_range_of_a_tensor_gives_what_the_tensor_gives(x: Tensor) -> None:
    for symmetric in (True, False):
        fmt = TensorFormat("int8", "tensor", symmetric=symmetric)
        low, high = (end.float().reshape(1) for end in (x.amin(), x.amax()))
        expected, given_range = choose_qparams(x, fmt), qparams_from_range(low, high, fmt)
        assert torch.equal(expected[0], given_range[0])
        assert symmetric or torch.equal(expected[1], given_range[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_named_and_counted(bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 8, dtype=dtype)
    weight[1, 2:5] = bad
    with pytest.raises(NumericsError, match=r"q_proj.weight holds 3 NaN or infinite of 32 elements; why"):
        require_finite(weight, "q_proj.weight", "; why")
    for fmt in INTEGER_FORMATS + FLOAT_FORMATS:
        with pytest.raises(NumericsError, match="weight holds 3"):
            quantize_tensor(weight, fmt)


def test_large_finite_numbers_whose_sum_overflows_are_fine() -> None:
    require_finite(torch.full((10,), 3e38), "weight")
    require_finite(torch.full((10,), 60000.0, dtype=torch.float16), "weight")
    require_finite(torch.zeros(3, dtype=torch.int8), "codes")


@given(x=tensors(), fmt=FORMATS)
def test_decoding_is_what_the_formula_says(x: Tensor, fmt: TensorFormat) -> None:
    quantized = quantize_tensor(x, fmt)
    zero = torch.zeros_like(quantized.scale) if quantized.zero_point is None else quantized.zero_point
    expected = (quantized.codes.float() - spread(zero, fmt, x.shape)) * spread(quantized.scale, fmt, x.shape)
    assert torch.equal(dequantize(quantized.codes, quantized.scale, quantized.zero_point, fmt), expected)


@pytest.mark.parametrize(
    "fmt",
    [
        TensorFormat("int4", "group", group_size=16),
        TensorFormat("int4", "group", group_size=16, symmetric=False),
        SCHEMES["nvfp4"].weight,
    ],
    ids=["symmetric", "asymmetric", "nvfp4"],
)
def test_rows_and_stacks_are_those_of_the_numbers(fmt: TensorFormat) -> None:
    x = torch.randn(3, 10, 32)
    members = [quantize_tensor(matrix, fmt) for matrix in x]
    stack = QuantizedTensor.stack(members)
    assert torch.equal(stack.dequantize(), torch.stack([member.dequantize() for member in members]))
    for member, unstacked in zip(members, stack.unstack(), strict=True):
        assert torch.equal(unstacked.dequantize(), member.dequantize())
        assert (unstacked.global_scale is None) == (member.global_scale is None)
        if unstacked.global_scale is not None and member.global_scale is not None:
            assert torch.equal(unstacked.global_scale, member.global_scale)
    parts = [members[0].rows(slice(0, 4)), members[0].rows(slice(4, 10))]
    assert torch.equal(QuantizedTensor.concatenate(parts).dequantize(), members[0].dequantize())
    assert torch.equal(members[0].rows(slice(None, None, 3)).dequantize(), members[0].dequantize()[::3])


def test_rows_that_share_a_scale_are_not_parted() -> None:
    whole = quantize_tensor(torch.randn(10, 32), TensorFormat("int8", "tensor"))
    assert whole.rows(slice(0, 10)) is whole
    with pytest.raises(SchemeError, match="shares scales between rows"):
        whole.rows(slice(0, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_is_rounded_as_its_codes_say(dtype: torch.dtype) -> None:
    fmt = TensorFormat("int8", "token", symmetric=False, dynamic=True)
    x = torch.randn(2, 5, 16).to(dtype)
    scale, zero_point = choose_qparams(x, fmt)
    expected = dequantize(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt)
    assert torch.equal(fake_quantize_input(x, fmt), expected)
    assert torch.equal(fake_quantize_input(x, fmt, scale, zero_point), expected)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@given(values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40))
def test_e2m1_codes_are_the_nearest_of_sixteen_values(values: list[float]) -> None:
    x, fmt = torch.tensor(values), SCHEMES["mxfp4a16"].weight
    grid = torch.tensor([sign * value for value in E2M1 for sign in (1.0, -1.0)])
    rounded = nearest_steps_(x.clone(), None, fmt)
    assert bool(torch.isin(rounded, grid).all())
    nearest = (x.unsqueeze(1) - grid).abs().amin(1)
    # Halves are exact in float32, so the error of a nearest value is known exactly.
    assert torch.equal((x - rounded).abs(), nearest)


def test_e2m1_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    for sign in (1, -1):
        assert torch.equal(nearest_steps_(sign * ties, None, SCHEMES["nvfp4"].weight), sign * expected)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
@given(exponent=st.floats(-30, 30), seed=st.integers(0, 999))
def test_stored_scales_do_not_move_when_they_are_stored_again(name: str, exponent: float, seed: int) -> None:
    fmt = SCHEMES[name].weight
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    first = quantize_tensor(x, fmt)
    assert torch.equal(storable_scale(first.scale, fmt, global_scale=first.global_scale), first.scale)
    assert bool((first.scale > 0).all())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_formats_with_stored_scales_name_what_is_not_finite(name: str, bad: float) -> None:
    x = torch.randn(4, 64)
    x[1, 40] = bad
    with pytest.raises(NumericsError, match="q_proj holds 1 NaN or infinite of 256"):
        quantize_tensor(x, SCHEMES[name].weight, "q_proj")
