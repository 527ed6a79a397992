"""Weights fitted to rounded inputs: the least squares of the definition, and no more of it than is worth having."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.algorithms.base import Group, RoundedInput
from qlinear.algorithms.gptq import quantize_columns
from qlinear.algorithms.parts.cholesky import Factor, factorize
from qlinear.algorithms.parts.input_error import fit_to_rounded_input
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import Scheme, TensorFormat

from ..test_gptq import EXAMPLES, inputs, weight_of

every_scheme = pytest.mark.parametrize("scheme", EXAMPLES, ids=lambda scheme: scheme.name)


def truncated(x: Tensor, step: float) -> Tensor:
    """Rounding that loses what others still tell of: always towards zero."""
    return (x / step).trunc() * step


def rounded_input(x: Tensor, rounded: Tensor) -> tuple[RoundedInput, RoundedInput]:
    """Of the first half of the tokens and of the second."""

    def of(tokens: slice) -> RoundedInput:
        lost, left = (x - rounded)[tokens], rounded[tokens]
        count = max(1, len(left))
        return RoundedInput(left.T @ left / count, lost.T @ left / count, len(left))

    middle = len(x) // 2
    return of(slice(0, middle)), of(slice(middle, len(x)))


def fit(weight: Tensor, x: Tensor, rounded: Tensor, damping: float = 0.01) -> Tensor:
    halves = rounded_input(x, rounded)
    both = halves[0] + halves[1]
    return fit_to_rounded_input({"w": weight}, halves, both, factor_of(both.hessian, damping))["w"]


def factor_of(hessian: Tensor, damping: float = 0.01) -> Factor:
    factor = factorize(hessian, damping)
    assert factor is not None
    return factor


def loss(weight: Tensor, other: Tensor, x: Tensor, rounded: Tensor) -> float:
    """E|x Wᵀ - x̂ Vᵀ|² in float64."""
    return float(
        (x.double() @ weight.double().T - rounded.double() @ other.double().T).square().sum(1).mean()
    )


@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_factor_solves_as_the_matrix_that_it_is_of(columns: int, seed: int, zeros: int) -> None:
    x = inputs(seed, columns, rank=3)
    x[:, :zeros] = 0
    hessian = (x.T @ x / len(x)).double()
    factor, power = factor_of(hessian.float()), hessian.diagonal()
    ridge = factor.damping * torch.where(power > 0, power, 1.0)
    rows = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    expected = rows.double() @ torch.linalg.inv(hessian + ridge.diag())
    size = torch.where(power > 0, power, 1.0).sqrt()
    error = (factor.solve(rows).double() - expected) * size
    assert float(error.norm() / (expected * size).norm()) < 1e-3


def test_both_halves_make_the_whole() -> None:
    x = inputs(0, 12, rank=4, tokens=31)
    rounded = truncated(x, 0.5)
    first, second = rounded_input(x, rounded)
    both = first + second
    assert both.tokens == 31
    torch.testing.assert_close(both.hessian, rounded.T @ rounded / 31)
    torch.testing.assert_close(both.drift, (x - rounded).T @ rounded / 31)


@pytest.mark.parametrize("step", [0.5, 2.0])
def test_with_many_tokens_it_is_the_least_squares_of_the_definition(step: float) -> None:
    x = inputs(0, 24, rank=4, tokens=8000, spread=0.0)
    rounded, weight = truncated(x, step), weight_of(0, 9, 24)
    found = fit(weight, x, rounded, damping=1e-5)
    expected = torch.linalg.lstsq(rounded.double(), x.double() @ weight.double().T).solution.T
    assert float((found - expected).norm() / (weight - expected).norm()) < 0.05
    assert loss(weight, found, x, rounded) < 0.7 * loss(weight, weight, x, rounded)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(32, 200), st.integers(1, 40), st.floats(0.05, 3))
def test_other_tokens_lose_next_to_nothing_by_a_fit_to_few(
    seed: int, count: int, rank: int, step: float
) -> None:
    x = inputs(seed, 40, rank=rank, tokens=count + 2000, spread=0.0)
    rounded = (x / step).round() * step  # what is lost has next to nothing to do with what is left
    weight, others = weight_of(seed, 30, 40), slice(count, None)
    found = fit(weight, x[:count], rounded[:count])
    before, after = (loss(weight, each, x[others], rounded[others]) for each in (weight, found))
    assert after <= 1.05 * before


def test_a_fit_to_few_tokens_is_held_back_where_the_whole_would_cost() -> None:
    x = inputs(7, 40, rank=40, tokens=2060, spread=0.0)
    rounded, weight = (x / 2).round() * 2, weight_of(7, 30, 40)
    seen, others = slice(0, 60), slice(60, None)
    first, second = rounded_input(x[seen], rounded[seen])
    both = first + second
    whole = weight + factor_of(both.hessian).solve(weight @ both.drift)
    losses = [
        loss(weight, each, x[others], rounded[others])
        for each in (weight, fit(weight, x[seen], rounded[seen]), whole)
    ]
    assert losses[2] > 1.3 * losses[0]
    assert losses[1] < 1.05 * losses[0]


def test_where_nothing_was_lost_or_the_halves_disagree_the_weight_stays_itself() -> None:
    x, weight = inputs(1, 16, rank=4), weight_of(1, 8, 16)
    assert fit(weight, x, x) is weight
    rounded = truncated(x, 1.0)
    first, second = rounded_input(x, rounded)
    contrary = (first, replace(first, drift=-first.drift))
    both = first + second
    assert fit_to_rounded_input({"w": weight}, contrary, both, factor_of(both.hessian))["w"] is weight


def test_halves_that_cannot_be_factorized_leave_the_weights_alone() -> None:
    beyond = torch.eye(16) - 3 * (1 - torch.eye(16))
    halves = (RoundedInput(beyond, torch.eye(16), 8), RoundedInput(torch.eye(16), torch.eye(16), 8))
    weights = {"w": weight_of(1, 8, 16)}
    assert fit_to_rounded_input(weights, halves, halves[1], factor_of(torch.eye(16)))["w"] is weights["w"]


@every_scheme
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    tiles=st.integers(1, 4),
    tokens=st.integers(1, 300),
    step=st.floats(0.01, 3),
)
def test_codes_are_never_further_from_what_fits_than_round_to_nearest_is(
    scheme: Scheme, seed: int, rows: int, tiles: int, tokens: int, step: float
) -> None:
    x = inputs(seed, 16 * tiles, rank=4, tokens=tokens)
    rounded, weight, unused = truncated(x, step), weight_of(seed, rows, 16 * tiles), torch.empty(0)
    halves = rounded_input(x, rounded)
    group = Group({"w": weight}, scheme, unused, unused, unused, unused, rounded_input=halves)
    aim = fit(weight, x, rounded)
    ours = quantize_columns(group)["w"].weight.dequantize()
    nearest = quantize_tensor(weight, scheme.weight).dequantize()
    rounding = 1e-6 * float(x.square().sum(1).mean())
    assert loss(aim, ours, rounded, rounded) <= loss(aim, nearest, rounded, rounded) * (1 + 1e-4) + rounding


def test_codes_for_rounded_inputs_lose_less_than_codes_that_know_nothing_of_it() -> None:
    scheme = Scheme("int8", TensorFormat("int8", "channel"))
    x, weight, unused = inputs(2, 64, rank=8, tokens=3000), weight_of(2, 32, 64), torch.empty(0)
    rounded = truncated(x, 1.0)
    group = Group({"w": weight}, scheme, unused, unused, unused, unused, x.T @ x / len(x))
    knowing = replace(group, rounded_input=rounded_input(x, rounded))
    ours, theirs = (quantize_columns(g)["w"].weight.dequantize() for g in (knowing, group))
    assert loss(weight, ours, x, rounded) < 0.7 * loss(weight, theirs, x, rounded)
