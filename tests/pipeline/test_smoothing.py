"""Smoothing leaves the function as it was, whatever the vectors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlinear.algorithms.smoothquant import smoothing_scale, weight_statistic
from qlinear.errors import SchemeError
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import TensorFormat
from qlinear.pipeline.group_statistics import GroupStatistics, flip_signs, group_scale
from qlinear.pipeline.smoothing import Smoothing
from qlinear.tracing.folds import Fold, InputGroup, Producer, Reader, find_groups
from qlinear.tracing.trace import Weight

from ..tracing.blocks import WIDTH, GatedBlock, OnePlusNorm, call_of, folds_of, perturbed


def test_the_papers_worked_example() -> None:
    s = smoothing_scale(torch.tensor([2.0, 16, 2, 9]), torch.tensor([2.0, 1, 2, 1]), alpha=0.5)
    assert s.tolist() == [1.0, 4.0, 1.0, 3.0]


@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 40), st.booleans())
def test_the_formula_is_that_of_its_definition_in_float64(
    seed: int, alpha: float, width: int, normalize: bool
) -> None:
    rng = np.random.default_rng(seed)
    a, w = np.exp(rng.normal(size=width) * 3), np.exp(rng.normal(size=width))
    expected = np.maximum(a**alpha / w ** (1 - alpha), 1e-5)
    if normalize:
        expected = expected / np.sqrt(expected.max() * expected.min())
    s = smoothing_scale(torch.tensor(a), torch.tensor(w), alpha, normalize=normalize)
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-5)


@given(st.integers(0, 2**31), st.sampled_from([None, 4, 8]))
def test_weight_statistics_are_those_of_their_definitions_in_float64(
    seed: int, group_size: int | None
) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(rows, 16)) for rows in (3, 5)]
    whole = np.abs(np.concatenate(weights))
    groups = whole.reshape(len(whole), -1, group_size or 16)
    mean = (groups / groups.max(-1, keepdims=True)).reshape(whole.shape).mean(0)
    tensors = [torch.tensor(w) for w in weights]
    np.testing.assert_allclose(weight_statistic(tensors, "mean", group_size).numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(weight_statistic(tensors, "absmax").numpy(), whole.max(0), rtol=1e-6)


def test_silent_channels_and_empty_columns_keep_a_scale_of_one() -> None:
    s = smoothing_scale(torch.tensor([0.0, 5.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert s.tolist() == [1.0, 1.0, 2.0]
    assert weight_statistic([torch.zeros(2, 3)], "mean").tolist() == [0, 0, 0]


def test_alpha_outside_its_range_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"alpha must lie in \[0, 1\]; got 1.5"):
        smoothing_scale(torch.ones(2), torch.ones(2), 1.5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), OnePlusNorm])
def test_folding_leaves_the_blocks_output_unchanged(norm: type[nn.Module], stored: torch.dtype) -> None:
    """Even where a gain is rounded to bfloat16: the readers compensate the gain that is stored."""
    block = perturbed(GatedBlock(norm))
    for name, p in block.named_parameters():
        p.data = p.to(stored).float()
        if "norm" in name and name.endswith("bias"):
            p.data.zero_()  # a bias is rounded as well, and nothing can compensate that
    for linear in (block.attention.v, block.up):
        linear.bias.data.zero_()
    trace, _, folds = folds_of(block)
    x = call_of(block, 2, 8).args[0]
    expected = block(x)
    stats = {p.weight: p.x.abs().amax(0) * torch.rand(p.x.shape[1]) * 100 for p in trace.products}
    matrices = {w: w.of(block).detach().clone() for w in stats}
    smoothing = Smoothing()
    for group in find_groups(trace, folds):
        assert group.fold is not None
        smoothing = smoothing.fold(block, group.fold, group_scale(group, matrices, stats, 0.7), stored)
    assert torch.equal(block(x), expected), "nothing changes before it is applied"
    smoothing.apply_to(block)
    assert len(smoothing.columns) == len(matrices)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    gain = block.norm1.weight
    assert torch.equal(gain, gain.to(stored).float()), "the gain is one that the file can hold"


def test_a_kept_vector_divides_the_input_and_multiplies_the_weight() -> None:
    block = perturbed(GatedBlock())
    trace, _, _ = folds_of(block)
    product = trace.products[0]
    s = torch.rand(WIDTH) + 0.5
    smoothing = Smoothing().keep(product.weight, s)
    matrix = smoothing.apply(product.weight, product.weight.of(block))
    torch.testing.assert_close((product.x / s) @ matrix.T, product.x @ product.weight.of(block).T)


def test_one_vector_serves_every_reader_of_a_group() -> None:
    trace, _, folds = folds_of(perturbed(GatedBlock()))
    group = next(g for g in find_groups(trace, folds) if len(g.weights) == 3)
    stats = {w: torch.full((WIDTH,), float(i + 1)) for i, w in enumerate(group.weights)}
    matrices = {w: torch.ones(4, WIDTH) * (i + 1) for i, w in enumerate(group.weights)}
    assert group_scale(group, matrices, stats, 0.5).tolist() == [1.0] * WIDTH


def brute_force(columns: np.ndarray, magnitudes: np.ndarray, form: str, alpha: float) -> np.ndarray:
    """s of its definition, float64. columns: the rows (out, in) of all weights of a group; magnitudes: a (in,)."""
    size = columns.shape[1]
    s = np.ones(size)
    for j in range(size):
        if form == "absmax":
            w = max(abs(row[j]) for row in columns)
        else:
            w = sum(abs(row[j]) / max(abs(row)) for row in columns) / len(columns)
        s[j] = magnitudes[j] ** alpha / w ** (1 - alpha)
    return s / np.sqrt(s.max() * s.min()) if form == "awq" else s


@pytest.mark.parametrize("form", ["absmax", "mean", "awq"])
@pytest.mark.parametrize("folded", [True, False])
def test_a_groups_vector_is_that_of_all_its_rows_in_every_form(form: str, folded: bool) -> None:
    """However many rows each of the weights that share an input has."""
    trace, _, folds = folds_of(perturbed(GatedBlock()))
    group = next(g for g in find_groups(trace, folds) if len(g.weights) == 3)
    group = group if folded else InputGroup(group.weights)
    rng = np.random.default_rng(0)
    rows = {weight: rng.normal(size=(i + 2, WIDTH)) for i, weight in enumerate(group.weights)}
    absmax, absmean = (np.exp(rng.normal(size=WIDTH)) for _ in range(2))
    statistics = GroupStatistics.of(
        group,
        {weight: torch.tensor(matrix) for weight, matrix in rows.items()},
        dict.fromkeys(group.weights, torch.tensor(absmax)),
        dict.fromkeys(group.weights, torch.tensor(absmean)),
    )
    expected = brute_force(
        np.concatenate(list(rows.values())), absmean if form == "awq" else absmax, form, 0.6
    )
    np.testing.assert_allclose(statistics.scale(0.6, form).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["absmax", "mean", "awq"])
def test_a_value_head_that_is_repeated_takes_the_largest_of_its_columns(form: str) -> None:
    """Grouped-query attention: channel c of v reaches columns c and c + 4 of the output projection."""
    value, output = Weight("v.weight"), Weight("o.weight")
    fold = Fold(Producer(4, weight=value), (Reader(output, torch.arange(8) % 4),))
    rng = np.random.default_rng(1)
    matrix, absmax, absmean = rng.normal(size=(3, 8)), *(np.exp(rng.normal(size=8)) for _ in range(2))
    statistics = GroupStatistics.of(
        InputGroup((output,), fold),
        {output: torch.tensor(matrix)},
        {output: torch.tensor(absmax)},
        {output: torch.tensor(absmean)},
    )
    a = (absmean if form == "awq" else absmax).reshape(2, 4).max(0)
    w = np.abs(matrix).max(0)
    if form != "absmax":
        w = (np.abs(matrix) / np.abs(matrix).max(1, keepdims=True)).mean(0)
    s = a**0.5 / w.reshape(2, 4).max(0) ** 0.5
    expected = s / np.sqrt(s.max() * s.min()) if form == "awq" else s
    np.testing.assert_allclose(statistics.scale(0.5, form).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["absmax", "mean", "awq"])
def test_a_group_that_no_token_reached_has_its_weights_evened_out_around_one(form: str) -> None:
    weight = Weight("expert.down", index=1)
    matrix = torch.randn(6, WIDTH)
    s = GroupStatistics.of(InputGroup((weight,)), {weight: matrix}, {}, {}).scale(0.5, form)
    assert bool(s.isfinite().all())
    torch.testing.assert_close(s.amax() * s.amin(), torch.tensor(1.0))
    column = weight_statistic([matrix * s], "absmax" if form == "absmax" else "mean")
    before = weight_statistic([matrix], "absmax" if form == "absmax" else "mean")
    assert column.amax() / column.amin() < before.amax() / before.amin()


def lopsided(tokens: int, seed: int) -> Tensor:
    """Inputs (tokens, 8) whose channels reach farther to one side, some up and some down."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator)
    x = torch.where(x > 0, x * 6, x) * torch.exp(torch.randn(8, generator=generator))
    return x * torch.tensor([1.0, -1.0]).repeat(4)


@pytest.mark.parametrize("seed", range(4))
def test_turned_channels_need_a_narrower_range_and_cost_less(seed: int) -> None:
    """Channels 0 to 3 of a value head reach columns 0 to 3 and 4 to 7, so two inputs share a sign."""
    weight, matrix, x = Weight("o.weight"), torch.randn(16, 8), lopsided(512, seed)
    x[:, 4:] = x[:, :4].flip(0) * 0.7
    fold = Fold(Producer(4, weight=Weight("v.weight")), (Reader(weight, torch.arange(8) % 4),))
    group = InputGroup((weight,), fold)
    signs, reach = flip_signs(group, {weight: matrix}, {weight: x.amin(0)}, {weight: x.amax(0)})
    assert signs.tolist() == [1, -1, 1, -1]
    absmax = {weight: x.abs().amax(0)}
    plain = fold.readers[0].spread(group_scale(group, {weight: matrix}, absmax, 1.0))
    best = fold.readers[0].spread(group_scale(group, {weight: matrix}, reach, 1.0) * signs)

    def lost(s: Tensor) -> float:
        scaled, fmt = x / s, TensorFormat("int8", "tensor", symmetric=False)
        return float(((quantize_tensor(scaled, fmt).dequantize() - scaled) * s @ matrix.T).square().sum())

    assert (x / best).aminmax().max <= 1.0001
    assert (x / best).amin() > -0.5
    assert lost(best) < 0.7 * lost(plain)


def test_channels_that_reach_both_ways_alike_keep_their_absmax() -> None:
    weight, high = Weight("up.weight"), torch.rand(8) + 1
    group = InputGroup(
        (weight,), Fold(Producer(8, gain=("norm.weight",)), (Reader(weight, torch.arange(8)),))
    )
    signs, reach = flip_signs(group, {weight: torch.randn(4, 8)}, {weight: -high}, {weight: high})
    assert torch.equal(signs, torch.ones(8))
    torch.testing.assert_close(reach[weight], high)
