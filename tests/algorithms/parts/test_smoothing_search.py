"""Smoothing vectors that are searched for: what alpha and AWQ choose, by their own objectives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.algorithms import alpha_search, awq
from qlinear.algorithms.awq import clip
from qlinear.algorithms.base import Group
from qlinear.algorithms.parts.clipping import ENDS
from qlinear.algorithms.parts.smoothing_search import DEFAULT, OFF, Objective, Point, Search
from qlinear.algorithms.smoothquant import smoothing_scale, weight_statistic
from qlinear.errors import NumericsError
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat, get_scheme

W4 = TensorFormat("int4", "group", group_size=16)
CASES = [
    SCHEMES["w8a8"],
    SCHEMES["w8a8-static"],
    SCHEMES["w8a8-asym"],
    Scheme("w4a16", W4),
    Scheme("w4a16-asym", TensorFormat("int4", "group", group_size=16, symmetric=False)),
    Scheme("w4a8", W4, SCHEMES["w8a8"].activation),
    SCHEMES["w4a16-channel"],
    SCHEMES["fp8-static"],
    SCHEMES["nvfp4"],
    SCHEMES["mxfp4"],
]
every_scheme = pytest.mark.parametrize("scheme", CASES, ids=lambda scheme: scheme.name)


def group_of(
    scheme: Scheme, seed: int = 0, columns: int = 64, outlier: float = 30.0, tokens: int = 80
) -> Group:
    """Two weights that read one tensor with a few outlier channels, and its statistics."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:3]] *= outlier
    weights = {name: torch.randn(rows, columns, generator=generator) for name, rows in (("a", 40), ("b", 7))}
    return Group(weights, scheme, x.amin(0), x.amax(0), x.abs().mean(0), x[: tokens // 2])


def scale_at(group: Group, point: Point) -> Tensor:
    """The smoothing vector (in,) of a group that stands alone, at a point of the family."""
    weights, size = list(group.weights.values()), group.scheme.weight.group_size
    if point.form == "off":
        return torch.ones_like(group.low)
    if point.form == "absmax":
        return smoothing_scale(group.absmax, weight_statistic(weights), point.alpha)
    relative = weight_statistic(weights, "mean", size)
    if point.form == "mean":
        return smoothing_scale(group.absmax, relative, point.alpha)
    return smoothing_scale(group.absmean, relative, point.alpha, normalize=True)


def search_alpha(group: Group) -> Search:
    return alpha_search.search_alpha([group], lambda point: [scale_at(group, point)])


def search_scale(group: Group) -> Search:
    return awq.search_scale([group], lambda point: [scale_at(group, point)])


def output_error(group: Group, s: Tensor) -> float:
    """The relative output error of all weights, written out: dynamic or no activations, float64 sums."""
    wrong = whole = 0.0
    for weight in group.weights.values():
        rounded = quantize_tensor(weight * s, group.scheme.weight, scale_dtype=group.scale_dtype).dequantize()
        x = group.sample / s
        if group.scheme.activation is not None:
            x = quantize_tensor(x, replace(group.scheme.activation, dynamic=False)).dequantize()
        exact = group.sample.double() @ weight.double().T
        wrong += float((x.double() @ rounded.double().T - exact).square().sum())
        whole += float(exact.square().sum())
    return (wrong / whole) ** 0.5


@pytest.mark.parametrize(
    "scheme", [case for case in CASES if not case.is_static], ids=lambda scheme: scheme.name
)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), outlier=st.floats(1, 100))
def test_the_objective_is_the_output_error_under_the_scheme(
    scheme: Scheme, seed: int, outlier: float
) -> None:
    group = replace(group_of(scheme, seed, outlier=outlier), scale_dtype=torch.bfloat16)
    s = scale_at(group, Point(0.6, "mean"))
    assert Objective.of([group]).error([s]) == pytest.approx(output_error(group, s), rel=1e-3)


@every_scheme
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), outlier=st.floats(1, 1000))
def test_the_alpha_found_is_never_worse_than_one_half(scheme: Scheme, seed: int, outlier: float) -> None:
    group = group_of(scheme, seed, outlier=outlier)
    found = search_alpha(group)
    objective = Objective.of([group])
    assert found.error == objective.error([scale_at(group, found.point)])
    assert found.default_error == objective.error([scale_at(group, DEFAULT)])
    assert found.error <= found.default_error
    # No weight here has more rows than the sweep looks at, so what it found is the least of its own curve.
    assert found.error == pytest.approx(min(error for _, error in found.curve), rel=1e-5)


@every_scheme
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), outlier=st.floats(1, 1000))
def test_the_scale_of_awq_is_never_worse_than_round_to_nearest(
    scheme: Scheme, seed: int, outlier: float
) -> None:
    group = group_of(scheme, seed, outlier=outlier)
    found = search_scale(group)
    objective = Objective.of([group], ENDS)
    assert found.error == objective.error([scale_at(group, found.point)])
    assert found.error <= objective.error([torch.ones(64)])


@every_scheme
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), outlier=st.floats(1, 1000))
def test_clipping_is_never_worse_than_round_to_nearest(scheme: Scheme, seed: int, outlier: float) -> None:
    group = group_of(scheme, seed, outlier=outlier)
    x = group.quantized_sample()
    for name, found in clip(group).items():
        weight = group.weights[name]
        exact = group.sample @ weight.T
        nearest = quantize_tensor(weight, scheme.weight, global_scale=group.global_scale).dequantize()
        ours = (x @ found.weight.dequantize().T - exact).square().sum()
        assert float(ours) == pytest.approx(found.error, rel=1e-4)
        assert float((x @ nearest.T - exact).square().sum()) == pytest.approx(found.rtn_error, rel=1e-4)
        assert found.error <= found.rtn_error


def test_awq_and_clipping_both_gain_on_four_bits() -> None:
    group = group_of(CASES[3], outlier=20.0)
    found = search_scale(group)
    assert found.error < 0.7 * found.default_error
    smoothed = group.smoothed(scale_at(group, found.point))
    clipped = clip(smoothed).values()
    # Measured: 0.23.
    assert sum(c.error for c in clipped) < 0.9 * sum(c.rtn_error for c in clipped)


def test_w8a8_moves_outliers_and_weight_only_schemes_need_not() -> None:
    assert search_alpha(group_of(SCHEMES["w8a8"], outlier=100.0)).point != OFF
    spiky = group_of(SCHEMES["w8a16"], outlier=1.0)
    assert search_alpha(spiky).error <= Objective.of([spiky]).error([torch.ones(64)])


def test_a_weight_of_more_rows_than_the_sweep_looks_at_is_judged_by_all_of_them() -> None:
    group = group_of(CASES[3])
    generator = torch.Generator().manual_seed(0)
    tall = replace(group, weights={"a": torch.randn(1500, 64, generator=generator)})
    found = search_alpha(tall)
    assert found.error == Objective.of([tall]).error([scale_at(tall, found.point)])
    assert found.error != dict(found.curve)[found.point]
    assert found.error < found.default_error


def test_groups_that_share_a_vector_are_judged_together() -> None:
    first, second = group_of(SCHEMES["w8a8"], 1), group_of(SCHEMES["w8a8"], 2, outlier=5.0)

    def scales_at(point: Point) -> list[Tensor]:
        s = scale_at(first, point)
        return [s, s.flip(0)]

    found = alpha_search.search_alpha([first, second], scales_at)
    objective = Objective.of([first, second])
    assert found.error == objective.error(scales_at(found.point))
    assert dict(found.curve).keys() >= {DEFAULT, OFF}


@every_scheme
def test_the_same_sample_gives_the_same_point_and_curve(scheme: Scheme) -> None:
    assert search_alpha(group_of(scheme)) == search_alpha(group_of(scheme))


def test_points_are_the_vectors_that_smoothing_defines() -> None:
    group = group_of(CASES[3])
    weights = list(group.weights.values())
    absmax, relative = weight_statistic(weights), weight_statistic(weights, "mean", 16)
    assert torch.equal(scale_at(group, OFF), torch.ones(64))
    assert torch.equal(scale_at(group, Point(0.3)), smoothing_scale(group.absmax, absmax, 0.3))
    assert torch.equal(scale_at(group, Point(0.3, "mean")), smoothing_scale(group.absmax, relative, 0.3))
    normalized = smoothing_scale(group.absmean, relative, 0.3, normalize=True)
    assert torch.equal(scale_at(group, Point(0.3, "awq")), normalized)


@every_scheme
def test_smoothing_a_group_leaves_its_output_unchanged(scheme: Scheme) -> None:
    group = group_of(scheme)
    group = replace(group, hessian=group.sample.T @ group.sample)
    smoothed = group.smoothed(scale_at(group, DEFAULT))
    for name, weight in group.weights.items():
        torch.testing.assert_close(
            smoothed.sample @ smoothed.weights[name].T, group.sample @ weight.T, rtol=1e-4, atol=1e-3
        )
    assert smoothed.hessian is not None
    torch.testing.assert_close(smoothed.hessian, smoothed.sample.T @ smoothed.sample, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(smoothed.absmax, group.absmax / scale_at(group, DEFAULT))


def test_a_group_that_is_turned_knows_its_extremes() -> None:
    """A negative s makes the least of a channel its greatest."""
    group = group_of(get_scheme("w8a8-static-asym"))
    x = group.sample
    group = replace(group, low=x.amin(0), high=x.amax(0), absmean=x.abs().mean(0))
    flip_signs = group.divided(torch.randn(64))
    torch.testing.assert_close(flip_signs.low, flip_signs.sample.amin(0))
    torch.testing.assert_close(flip_signs.high, flip_signs.sample.amax(0))
    torch.testing.assert_close(flip_signs.absmean, flip_signs.sample.abs().mean(0))


def test_static_activations_are_rounded_with_the_range_of_all_tokens() -> None:
    group = group_of(get_scheme("w8a8-static"))
    step = float(group.absmax.max()) / 127
    codes = group.quantized_sample() / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float((group.quantized_sample() - group.sample).abs().max()) <= step / 2 * 1.001


def test_an_input_of_zeros_and_a_dead_channel_are_no_trouble() -> None:
    group = group_of(SCHEMES["w8a8"])
    x = group.sample.clone()
    x[:, 3] = 0
    dead = replace(group, low=x.amin(0), high=x.amax(0), absmean=x.abs().mean(0), sample=x)
    assert search_alpha(dead).error < 0.1
    nothing = torch.zeros(64)
    silent = replace(group, low=nothing, high=nothing, absmean=nothing, sample=torch.zeros(5, 64))
    assert search_alpha(silent).error == search_scale(silent).error == 0
    assert clip(silent)["a"].error == 0


def test_nan_is_named() -> None:
    group = group_of(SCHEMES["w8a8"])
    broken = replace(group, weights={"q_proj": torch.full((4, 64), torch.nan)})
    with pytest.raises(NumericsError, match="q_proj holds 256 NaN"):
        alpha_search.search_alpha([broken], lambda _: [torch.ones(64)])
