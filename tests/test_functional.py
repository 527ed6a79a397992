"""The pure functions: the integer formula, and agreement with the operator that PyTorch is removing."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.errors import QLinearError
from qlinear.functional import linear, prepack, quantized_linear
from qlinear.ops import onednn_product

DTYPES = st.sampled_from([torch.int8, torch.uint8])


class Problem:
    """Random codes with every scale and zero point that the function takes."""

    def __init__(
        self, dtype: torch.dtype, rows: int, width: int, out: int, channels: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        self.x = torch.randint(low, high + 1, (rows, width), generator=generator).to(dtype)
        self.w = torch.randint(-128, 128, (out, width), generator=generator, dtype=torch.int8)
        self.x_scale, self.x_zero = 0.02, int(torch.randint(low, high + 1, (), generator=generator))
        self.w_scale = torch.rand(out if channels else 1, generator=generator) * 0.01 + 1e-3
        self.bias = torch.randn(out, generator=generator) if seed % 2 else None

    def accumulator(self, w_zero: Tensor | int = 0) -> Tensor:
        w = self.w.long() - (w_zero.reshape(-1, 1).long() if isinstance(w_zero, Tensor) else w_zero)
        return (self.x.long() - self.x_zero) @ w.t()

    def expected(self, w_zero: Tensor | int = 0) -> Tensor:
        y = self.accumulator(w_zero).float() * self.w_scale * torch.tensor(self.x_scale)
        return y if self.bias is None else y + self.bias

    def __call__(self, **options: object) -> Tensor:
        weight = options.pop("weight", self.w)
        return quantized_linear(
            self.x, weight, self.bias, x_scale=self.x_scale, x_zero_point=self.x_zero, w_scale=self.w_scale,
            **options,
        )  # type: ignore[arg-type] # fmt: skip


problems = st.builds(
    Problem,
    DTYPES,
    st.integers(1, 40),
    st.integers(1, 1300),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 99),
)


def test_linear_is_the_float_layer() -> None:
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    torch.testing.assert_close(linear(x, weight, bias), x @ weight.t() + bias)


@given(problem=problems)
def test_float_output_is_the_formula_bit_for_bit(problem: Problem) -> None:
    assert torch.equal(problem(), problem.expected())
    assert torch.equal(problem(out_dtype=torch.bfloat16), problem.expected().bfloat16())
    assert torch.equal(problem(weight=prepack(problem.w)), problem.expected())


@given(problem=problems, per_channel=st.booleans(), zero=st.integers(-128, 127))
def test_weights_may_have_zero_points(problem: Problem, per_channel: bool, zero: int) -> None:
    w_zero: Tensor | int = zero
    if per_channel:
        w_zero = (torch.arange(len(problem.w)) % 256 - 128).to(torch.int8)
    assert torch.equal(problem(w_zero_point=w_zero), problem.expected(w_zero))


@given(problem=problems, zero=st.integers(0, 127), scale=st.sampled_from([0.01, 0.1, 1.7]))
def test_requantized_output_is_rounded_and_clamped(problem: Problem, zero: int, scale: float) -> None:
    low, high = torch.iinfo(problem.x.dtype).min, torch.iinfo(problem.x.dtype).max
    expected = ((problem.expected() / torch.tensor(scale)).round() + zero).clamp(low, high)
    codes = problem(out_scale=scale, out_zero_point=zero)
    assert codes.dtype == problem.x.dtype
    assert torch.equal(codes.float(), expected)
    assert torch.equal(problem(out_scale=scale, out_zero_point=zero, w_zero_point=0 * problem.w[:, 0]), codes)


@given(problem=problems)
def test_output_may_take_the_scale_of_the_input(problem: Problem) -> None:
    as_input = problem(out_scale=problem.x_scale, out_zero_point=problem.x_zero)
    assert torch.equal(problem(out_scale="input"), as_input)


def torchs_own(problem: Problem, scale: float, zero: int) -> Tensor:
    """`torch.ops.quantized.linear` on the quantized tensors that PyTorch is removing."""
    qdtype = torch.quint8 if problem.x.dtype == torch.uint8 else torch.qint8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch._make_per_tensor_quantized_tensor(problem.x, problem.x_scale, problem.x_zero)
        assert x.dtype == qdtype
        scales = problem.w_scale.double().expand(len(problem.w)).contiguous()
        zeros = torch.zeros(len(problem.w), dtype=torch.long)
        w = torch._make_per_channel_quantized_tensor(problem.w, scales, zeros, 0)
        packed = torch.ops.quantized.linear_prepack(w, problem.bias)
        return torch.ops.quantized.linear(x, packed, scale, zero).int_repr()


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    if request.param not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this build of torch has no {request.param} engine")
    return str(request.param)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("x86", torch.uint8), ("onednn", torch.uint8), ("onednn", torch.int8)],
    indirect=["engine"],
)
def test_it_agrees_with_torchs_own_to_at_most_one_code(engine: str, dtype: torch.dtype) -> None:
    if engine == "onednn" and not onednn_product.is_exact():
        pytest.skip("torch's sums saturate on this processor")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    equal = total = 0
    try:
        for seed in range(40):
            problem = Problem(dtype, 1 + seed, 1 + 29 * seed, 1 + 3 * seed, seed % 3 > 0, seed)
            problem.x_zero = 0 if engine == "onednn" and dtype == torch.int8 else problem.x_zero
            ours = problem(out_scale=0.5, out_zero_point=3).int()
            theirs = torchs_own(problem, 0.5, 3).int()
            assert int((ours - theirs).abs().max()) <= 1
            equal, total = equal + int((ours == theirs).sum()), total + ours.numel()
    finally:
        torch.backends.quantized.engine = before
    assert equal >= 0.999 * total


def test_prepacked_weights_are_packed_once_and_plain_ones_on_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not onednn_product.is_exact():
        pytest.skip("no packed product on this processor")
    calls, pack = [], onednn_product.pack
    monkeypatch.setattr(onednn_product, "pack", lambda weight: (calls.append(1), pack(weight))[1])
    problem = Problem(torch.uint8, 3, 16, 5, True, 1)
    packed = prepack(problem.w)
    for _ in range(3):
        problem(weight=packed)
    assert len(calls) == 1
    for _ in range(3):
        problem()
    assert len(calls) == 4


@settings(max_examples=20)
@given(shape=st.lists(st.integers(0, 3), max_size=3), requantize=st.booleans())
def test_leading_dimensions_are_kept(shape: list[int], requantize: bool) -> None:
    x, w = torch.ones(*shape, 8, dtype=torch.int8), torch.ones(6, 8, dtype=torch.int8)
    y = quantized_linear(x, w, x_scale=1.0, w_scale=1.0, out_scale=1.0 if requantize else None)
    assert y.shape == (*shape, 6)
    assert bool((y == 8).all())


X, W = torch.ones(2, 8, dtype=torch.uint8), torch.ones(6, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("x", "w", "options", "message"),
    [
        (X.float(), W, {}, "x_codes must be int8 or uint8; got torch.float32"),
        (X, W.float(), {}, "w_codes must be int8; got torch.float32"),
        (X, W[0], {}, r"w_codes must be \(out, in\); got shape \(8,\)"),
        (X[:, 1:], W, {}, r"x_codes' last dimension must be in, 8; got shape \(2, 7\)"),
        (X, W, {"bias": torch.ones(5)}, r"bias must be \(6,\); got shape \(5,\)"),
        (X, W, {"w_scale": torch.ones(5)}, "w_scale must have 1 or 6 elements; got 5"),
        (X, W, {"x_scale": torch.ones(2)}, "x_scale must have 1 elements; got 2"),
        (X, W, {"x_zero_point": 256}, r"x_zero_point must lie in \[0, 255\] .* got 256"),
        (X, W, {"w_zero_point": 128}, r"w_zero_point must lie in \[-128, 127\] .* got 128"),
        (X, W, {"out_zero_point": 1}, "out_zero_point goes with out_scale"),
        (X, W, {"out_scale": 1.0, "out_zero_point": -1}, r"out_zero_point must lie in \[0, 255\]"),
        (X, W, {"out_scale": "input", "out_zero_point": 1}, "takes the input's zero point"),
        (X, W, {"out_dtype": torch.int8}, "out_dtype must be a float dtype"),
        (X, W, {"out_scale": 1.0, "out_dtype": torch.int8}, "has the input codes' dtype, torch.uint8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    x: Tensor, w: Tensor, options: dict[str, object], message: str
) -> None:
    with pytest.raises(QLinearError, match=message):
        quantized_linear(x, w, **{"x_scale": 1.0, "w_scale": 1.0, **options})  # type: ignore[arg-type]
