"""The range of a static input: chosen where the outputs lose least, on tokens that it was not made of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.algorithms import Group, choose_static_range
from qlinear.algorithms.parts.static_range import SHARES
from qlinear.formats.scheme import get_scheme

SCHEMES = ["w8a8-static", "w8a8-static-asym", "fp8-static"]


def group_of(x: Tensor, sample: Tensor, scheme: str, rows: int = 24) -> Group:
    """A group whose sample is no part of x (tokens, in), the others."""
    both = torch.cat([x, sample])
    weight = torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(1))
    return Group(
        {"w": weight}, get_scheme(scheme), both.amin(0), both.amax(0), both.abs().mean(0), sample,
        others=(x.amin(0), x.amax(0)),
    )  # fmt: skip


def tokens(count: int, seed: int, tail: float = 1.0) -> Tensor:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return x.abs().pow(tail) * x.sign()


def lost(group: Group, share: float) -> Tensor:
    """What the outputs of each token of the sample lose with that share of the others' range, by the definition."""
    group = group.without_sample()
    group = replace(group, low=group.low * share, high=group.high * share)
    (weight,) = group.weights.values()
    return ((group.sample - group.quantized_sample()) @ weight.T).square().sum(1)


def is_beaten(group: Group, share: float, by: float) -> bool:
    """Whether one share loses more than another by more than a standard error over the tokens."""
    more = lost(group, share) - lost(group, by)
    return float(more.mean()) > float(more.std()) / len(more) ** 0.5 * (1 + 1e-3) + 1e-9


@given(st.sampled_from(SCHEMES), st.integers(2, 60), st.floats(0.5, 4), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_the_least_change_that_no_share_beats_by_more_than_chance(
    scheme: str, count: int, tail: float, seed: int
) -> None:
    group = group_of(tokens(count, seed, tail), tokens(count, seed + 1, tail), scheme)
    found = choose_static_range(group)
    share = min(SHARES, key=lambda share: abs(float(found.high.max() / group.high.max()) - share))
    torch.testing.assert_close(found.low, group.low * share)
    best = min(SHARES, key=lambda share: float(lost(group, share).sum()))
    assert not is_beaten(group, share, best)
    nearer = SHARES[: SHARES.index(share)]
    assert all(float(lost(group, each).sum()) > float(lost(group, best).sum()) for each in nearer)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-static-asym"])
def test_rare_values_are_cut_off_and_what_few_tokens_showed_is_widened(scheme: str) -> None:
    rare = torch.cat([tokens(4000, 0), torch.full((1, 16), 60.0), torch.full((1, 16), -60.0)])
    assert float(choose_static_range(group_of(rare, tokens(256, 1), scheme)).high.max()) < 30
    few = group_of(tokens(2, 0), tokens(256, 1), scheme)
    assert float(choose_static_range(few).high.max()) > float(few.high.max())


def test_without_other_tokens_the_whole_range_is_what_is_tried() -> None:
    group = replace(group_of(tokens(9, 0), tokens(9, 1), "w8a8-static"), others=None)
    assert group.without_sample() is group
    assert choose_static_range(group).high.max() <= group.high.max(), "nothing of the sample is beyond it"
