"""GPTQ: against a transcription of the paper, and never above round to nearest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.algorithms import gptq
from qlinear.algorithms.base import Group
from qlinear.algorithms.gptq import GptqResult, quantize_columns
from qlinear.algorithms.parts.cholesky import factorize
from qlinear.algorithms.parts.coordinate_descent import row_losses
from qlinear.errors import NumericsError, SchemeError
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scales import storable_scale
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat
from qlinear.runtime.threads import CoreThreads

EXAMPLES = [
    Scheme("int8", TensorFormat("int8", "channel")),
    Scheme("int4", TensorFormat("int4", "group", group_size=16)),
    Scheme("int4-asym", TensorFormat("int4", "group", group_size=16, symmetric=False)),
    Scheme("int4-channel", TensorFormat("int4", "channel")),
    Scheme("fp8-block", TensorFormat("float8_e4m3fn", "block", block_size=(8, 16))),
    Scheme("int8-tensor", TensorFormat("int8", "tensor")),
    Scheme("nvfp4", SCHEMES["nvfp4a16"].weight),
    Scheme("mxfp4", replace(SCHEMES["mxfp4a16"].weight, group_size=16)),
]
every_scheme = pytest.mark.parametrize("scheme", EXAMPLES, ids=lambda scheme: scheme.name)


def inputs(seed: int, columns: int, rank: int, tokens: int = 256, spread: float = 1.0) -> Tensor:
    """Tokens (tokens, columns) that live near a subspace, with channels of sizes 10^-spread to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    x = low + 0.1 * rank**0.5 * torch.randn(tokens, columns, generator=generator)
    return x * 10.0 ** (spread * (2 * torch.rand(columns, generator=generator) - 1))


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def weight_of(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))


def group_of(weights: dict[str, Tensor], scheme: Scheme, hessian: Tensor, **more: Any) -> Group:
    """What GPTQ works on; it looks at nothing but weights and second moments."""
    unused = torch.empty(0)
    return Group(weights, scheme, unused, unused, unused, unused, hessian, **more)


def result_of(weight: Tensor, scheme: Scheme, hessian: Tensor) -> GptqResult:
    return quantize_columns(group_of({"w": weight}, scheme, hessian))["w"]


@pytest.fixture
def extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales from the extremes of each tile, as the paper has them."""
    monkeypatch.setattr(gptq, "_RATIOS", (1.0,))


def true_loss(weight: Tensor, quantized: Tensor, x: Tensor) -> Tensor:
    """Mean squared output error of each row, in float64: another way than the code under test."""
    return (x.double() @ (weight.double() - quantized.double()).T).square().mean(0)


@every_scheme
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    tiles=st.integers(1, 4),
    tokens=st.integers(1, 300),
    spread=st.floats(0, 2),
)
def test_it_is_never_above_round_to_nearest(
    scheme: Scheme, seed: int, rows: int, tiles: int, tokens: int, spread: float
) -> None:
    x = inputs(seed, 16 * tiles, rank=4, tokens=tokens, spread=spread)
    weight = weight_of(seed, rows, 16 * tiles)
    result = result_of(weight, scheme, hessian_of(x))
    ours = true_loss(weight, result.weight.dequantize(), x)
    nearest = true_loss(weight, quantize_tensor(weight, scheme.weight).dequantize(), x)
    rounding = 1e-5 * nearest.sum() + 1e-6 * hessian_of(x).trace()
    assert float(ours.sum()) <= float(nearest.sum() + rounding)


@every_scheme
@pytest.mark.parametrize("seed", range(4))
def test_with_correlated_inputs_it_loses_less_than_half_of_what_round_to_nearest_loses(
    scheme: Scheme, seed: int
) -> None:
    x = inputs(seed, 192, rank=24, tokens=1000)
    weight = weight_of(seed, 64, 192)
    result = result_of(weight, scheme, hessian_of(x))
    ours = true_loss(weight, result.weight.dequantize(), x).sum()
    nearest = true_loss(weight, quantize_tensor(weight, scheme.weight).dequantize(), x).sum()
    assert ours < 0.5 * nearest


def paper(
    weight: Tensor, hessian: Tensor, order: Tensor, step: Tensor, zero: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Frantar et al. with an inverse, unblocked, float64: int4 codes, and their targets, in `order`."""
    w, h = weight.double()[:, order].clone(), hessian.double()[order][:, order]
    step, zero = step.double()[:, order], zero.double()[:, order]
    h = h + damping * torch.diag(h.diagonal())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, exact = torch.zeros_like(w), torch.zeros_like(w)
    for k in range(len(order)):
        exact[:, k] = w[:, k] / step[:, k]
        codes[:, k] = (exact[:, k].round() + zero[:, k]).clamp(-8, 7)
        error = (w[:, k] - (codes[:, k] - zero[:, k]) * step[:, k]) / upper[k, k]
        w[:, k:] -= error.unsqueeze(1) * upper[k, k:]
    return codes, exact


@pytest.mark.parametrize("scheme", EXAMPLES[1:3], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("columns", [32, 96, 208])
@pytest.mark.usefixtures("extremes")
def test_its_codes_are_those_of_the_paper(
    scheme: Scheme, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_SWEEPS", 0)
    x = inputs(3, columns, rank=8, tokens=600, spread=0.3)
    weight, hessian = weight_of(3, 40, columns), hessian_of(x)
    factor = factorize(hessian)
    assert factor is not None
    result = result_of(weight, scheme, hessian)
    assert result.rows_kept == 0
    found = result.weight
    zero = torch.zeros_like(found.scale) if found.zero_point is None else found.zero_point
    step, zero = (per_group.repeat_interleave(16, 1) for per_group in (found.scale, zero))
    expected, exact = paper(weight, hessian, factor.order, step, zero, 0.01)
    # Where float64 sees the middle between two codes, to float32's error, either is right, and what follows in
    # that row follows from the choice.
    differs = found.codes[:, factor.order] != expected
    undecided = ((exact - exact.floor()) - 0.5).abs() < 1e-3
    assert bool((differs.cumsum(1) <= differs.numel() * undecided.cumsum(1)).all())
    assert float(differs.any(1).float().mean()) < 0.2


def test_the_factor_multiplies_out_to_the_damped_moment() -> None:
    hessian = hessian_of(inputs(0, 60, rank=6, spread=3.0))
    hessian[7], hessian[:, 7] = 0, 0
    factor = factorize(hessian)
    assert factor is not None
    unit = factor.upper.triu(1).double() + torch.eye(60).double()
    product = unit @ factor.pivots.double().diag() @ unit.T
    damped = hessian.double() + factor.damping * hessian.double().diagonal().diag()
    damped[7, 7] = factor.damping
    size = damped.diagonal().sqrt()[factor.order]
    expected = damped[factor.order][:, factor.order] / size / size.unsqueeze(1)
    torch.testing.assert_close(product / size / size.unsqueeze(1), expected, rtol=0, atol=1e-5)
    assert bool((hessian.diagonal()[factor.order].diff() <= 0).all())


@given(width=st.integers(1, 700), tokens=st.integers(1, 900), seed=st.integers(0, 999))
@settings(max_examples=15)
def test_the_factor_multiplies_as_the_moment_does(width: int, tokens: int, seed: int) -> None:
    x = inputs(seed, width, rank=6, tokens=tokens)
    x[:, 0] = 0
    factor = factorize(hessian_of(x))
    assert factor is not None
    columns = weight_of(seed, width, 3)
    whitened = factor.upper.T @ columns[factor.order]
    expected = hessian_of(x) @ columns
    size = float(expected.abs().max()) + float((factor.ridge.unsqueeze(1) * columns).abs().max())
    assert float((factor.times(columns, whitened) - expected).abs().max()) <= 1e-5 * size


@pytest.mark.usefixtures("extremes")
def test_channels_that_were_always_zero_are_rounded_to_nearest() -> None:
    x = inputs(5, 64, rank=4)
    x[:, 10:20] = 0
    weight, scheme = weight_of(5, 24, 64), EXAMPLES[0]
    result = result_of(weight, scheme, hessian_of(x))
    nearest = quantize_tensor(weight, scheme.weight)
    assert torch.equal(result.weight.codes[:, 10:20], nearest.codes[:, 10:20])
    assert not torch.equal(result.weight.codes, nearest.codes)


@every_scheme
@pytest.mark.usefixtures("extremes")
def test_an_input_that_was_always_zero_gives_round_to_nearest(scheme: Scheme) -> None:
    weight = weight_of(1, 16, 32)
    hessian = torch.zeros(32, 32)
    result = result_of(weight, scheme, hessian)
    assert torch.equal(result.weight.codes.float(), quantize_tensor(weight, scheme.weight).codes.float())


def test_damping_grows_until_it_is_enough_and_is_reported() -> None:
    hessian = hessian_of(inputs(0, 32, rank=4))
    # Second moments that no inputs have, as rounding in a narrow dtype can leave them.
    vectors, values = torch.linalg.eigh(
        hessian / hessian.diagonal().sqrt() / hessian.diagonal().sqrt().unsqueeze(1)
    )[::-1]
    values[0] = -0.05
    indefinite = vectors @ values.diag() @ vectors.T
    factor = factorize(indefinite / 2 + indefinite.T / 2)
    assert factor is not None
    assert factor.damping == pytest.approx(0.1)


def test_moments_beyond_repair_are_said_to_be_so() -> None:
    hessian = torch.eye(32) - 3 * (1 - torch.eye(32))
    assert factorize(hessian) is None
    weight = weight_of(0, 8, 32)
    result = result_of(weight, EXAMPLES[0], hessian)
    assert result.fell_back
    assert result.rows_kept == 8
    assert torch.equal(result.weight.codes, quantize_tensor(weight, EXAMPLES[0].weight).codes)


def test_damping_does_not_depend_on_the_sizes_of_channels() -> None:
    x = inputs(2, 48, rank=6, spread=0.0)
    order = torch.arange(48)
    size = 2.0 ** torch.randint(-8, 8, (48,), generator=torch.Generator().manual_seed(0))
    plain, sized = factorize(hessian_of(x)), factorize(hessian_of(x * size))
    assert plain is not None
    assert sized is not None
    assert torch.equal(order, sized.order.sort().values)
    assert plain.damping == sized.damping


@every_scheme
def test_the_same_input_gives_the_same_codes(scheme: Scheme) -> None:
    x, weight = inputs(1, 96, rank=8), weight_of(1, 33, 96)
    first, second = (result_of(weight, scheme, hessian_of(x)) for _ in range(2))
    assert torch.equal(first.weight.codes.float(), second.weight.codes.float())
    assert torch.equal(first.weight.scale, second.weight.scale)


@every_scheme
@settings(max_examples=10)
@given(rows=st.integers(1, 5), tiles=st.integers(1, 3))
def test_any_shape_comes_back_as_it_went_in(scheme: Scheme, rows: int, tiles: int) -> None:
    columns = 16 * tiles
    weight, hessian = weight_of(0, rows, columns), hessian_of(inputs(0, columns, rank=2))
    found = quantize_columns(group_of({"w": weight}, scheme, hessian, scale_dtype=torch.bfloat16))["w"].weight
    low, high = scheme.weight.code_range
    assert found.codes.shape == weight.shape
    assert found.codes.is_contiguous()
    assert found.codes.dtype == scheme.weight.storage
    assert found.scale.shape == scheme.weight.scale_shape(weight.shape)
    assert torch.equal(
        found.scale, storable_scale(found.scale, found.format, torch.bfloat16, found.global_scale)
    )
    assert low <= float(found.codes.float().min()) <= float(found.codes.float().max()) <= high


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 1000))
def test_losses_are_the_quadratic_form_of_each_row(rows: int, columns: int, seed: int) -> None:
    error, hessian = weight_of(seed, rows, columns), hessian_of(inputs(seed, columns, rank=2))
    expected = (error.double() @ hessian.double() * error.double()).sum(1)
    torch.testing.assert_close(row_losses(error.T, hessian).double(), expected, rtol=1e-4, atol=1e-4)


def test_losses_of_many_panels_are_those_of_one() -> None:
    error, hessian = weight_of(0, 5, 1200), hessian_of(inputs(0, 1200, rank=9))
    expected = (error.double() @ hessian.double() * error.double()).sum(1)
    torch.testing.assert_close(row_losses(error.T, hessian).double(), expected, rtol=1e-4, atol=1e-4)


@contextmanager
def on_cores(count: int) -> Iterator[CoreThreads]:
    with ThreadPoolExecutor(count) as pool:
        yield CoreThreads(pool, count)


@pytest.mark.parametrize("scheme", EXAMPLES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("at_once", "cores"), [(1, 1), (5 * 48, 1), (1 << 20, 1), (1 << 20, 3), (9 * 48, 2)])
def test_weights_of_a_group_come_out_as_each_alone(
    scheme: Scheme, at_once: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "_AT_ONCE", at_once)
    monkeypatch.setattr(gptq, "on_each_core_or_here", lambda device, max_threads: on_cores(cores))
    hessian = hessian_of(inputs(3, 48, rank=6))
    weights = {name: weight_of(i, rows, 48) for i, (name, rows) in enumerate((("q", 16), ("k", 7), ("v", 1)))}
    for weight in weights.values():
        weight[0, 0] = 6.0  # what is shared by all weights, as global scales are, each has alone, too
    together = quantize_columns(group_of(weights, scheme, hessian))
    for name, weight in weights.items():
        alone = result_of(weight, scheme, hessian)
        # Products of other shapes add up in another order.
        torch.testing.assert_close(together[name].weight.scale, alone.weight.scale)
        assert torch.equal(together[name].weight.codes.float(), alone.weight.codes.float())
        assert together[name].rows_kept == alone.rows_kept


def test_weights_that_train_are_rounded_like_others() -> None:
    weight, hessian = weight_of(5, 12, 48), hessian_of(inputs(5, 48, rank=6))
    expected = result_of(weight, EXAMPLES[1], hessian).weight
    found = result_of(weight.requires_grad_(), EXAMPLES[1], hessian).weight
    assert torch.equal(found.codes, expected.codes)
    assert not found.scale.requires_grad


def test_mistakes_are_named() -> None:
    weight, hessian = torch.ones(4, 32), torch.eye(32)
    broken = torch.where(torch.arange(128).view(4, 32) == 40, torch.nan, weight)
    with pytest.raises(NumericsError, match=r"q_proj holds 1 NaN"):
        quantize_columns(group_of({"q_proj": broken}, EXAMPLES[0], hessian))
    with pytest.raises(NumericsError, match=r"second moment of q_proj holds 1024 NaN"):
        factorize(hessian * torch.nan, name="q_proj")
    with pytest.raises(
        NumericsError, match=r"hessian must be \(in, in\) of q_proj \(4, 32\); got \(16, 16\)"
    ):
        quantize_columns(group_of({"q_proj": weight}, EXAMPLES[0], torch.eye(16)))
    with pytest.raises(NumericsError, match="second moments of the input of q_proj; the group has none"):
        quantize_columns(replace(group_of({"q_proj": weight}, EXAMPLES[0], hessian), hessian=None))
    with pytest.raises(SchemeError, match="not divisible by group_size 16"):
        quantize_columns(group_of({"w": torch.ones(4, 20)}, EXAMPLES[1], torch.eye(20)))
