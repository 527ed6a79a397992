"""What is remembered of the inputs of weights."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear.calibrate import StatsCollector


@given(st.integers(1, 40), st.sampled_from([1, 3, 512, 700]), st.integers(0, 2**16))
@settings(max_examples=15)
def test_second_moments_are_the_mean_of_outer_products(tokens: int, width: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    collector = StatsCollector(4, second_moment=True)
    for part in x.split(7):
        collector.update(part)
    moment = collector.stats("x").moment
    assert moment is not None
    torch.testing.assert_close(moment, (x.double().T @ x.double() / tokens).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(moment, moment.T)


@given(st.integers(1, 300), st.sampled_from([1, 5, 1024]), st.integers(0, 2**16), st.booleans())
@settings(max_examples=25, deadline=None)
def test_statistics_are_those_of_all_tokens_at_once(tokens: int, width: int, seed: int, half: bool) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 3 - 1
    x = x.to(torch.bfloat16 if half else torch.float32)
    collector = StatsCollector(4)
    for part in x.split(137):
        collector.update(part)
    found, whole = collector.stats("x"), x.float()
    assert found.tokens == tokens
    assert torch.equal(found.min, whole.amin(0))
    assert torch.equal(found.max, whole.amax(0))
    assert torch.equal(found.absmax, whole.abs().amax(0))
    torch.testing.assert_close(found.mean, whole.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.absmean, whole.abs().mean(0), rtol=1e-4, atol=1e-5)
