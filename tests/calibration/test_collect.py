"""Statistics of weights' inputs: exact, and the same whether or not the lanes advance."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qlinear.calibration.collect import calibrate
from qlinear.calibration.stats import InputStats, StatsCollector
from qlinear.streaming.find_blocks import find_blocks
from qlinear.streaming.lanes import Lanes, batches_of
from qlinear.tracing.proof import run_in_float32
from qlinear.tracing.trace import Weight

from ..support.models import VOCABULARY


@given(st.integers(1, 40), st.sampled_from([1, 3, 512, 700]), st.integers(0, 2**16))
@settings(max_examples=15)
def test_the_hessian_is_the_mean_of_outer_products(tokens: int, width: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    collector = StatsCollector(4, hessian=True)
    for part in x.split(7):
        collector.update(part)
    hessian = collector.stats("x").hessian
    assert hessian is not None
    torch.testing.assert_close(hessian, (x.double().T @ x.double() / tokens).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(hessian, hessian.T)


@given(st.integers(1, 300), st.sampled_from([1, 5, 1024]), st.integers(0, 2**16), st.booleans())
@settings(max_examples=25, deadline=None)
def test_statistics_are_those_of_all_tokens_at_once(tokens: int, width: int, seed: int, half: bool) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * 3 - 1
    x = x.to(torch.bfloat16 if half else torch.float32)
    collector = StatsCollector(4)
    for part in x.split(137):
        collector.update(part)
    stats, whole = collector.stats("x"), x.float()
    assert stats.tokens == tokens
    assert torch.equal(stats.min, whole.amin(0))
    assert torch.equal(stats.max, whole.amax(0))
    assert torch.equal(stats.absmax, whole.abs().amax(0))
    torch.testing.assert_close(stats.mean, whole.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.absmean, whole.abs().mean(0), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_the_unsampled_range_is_of_tokens_outside_the_sample(
    tokens: int, per_batch: int, batches: int, width: int, seed: int
) -> None:
    x = (
        torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
        + torch.arange(tokens)[:, None]
    )
    collector, parts = StatsCollector(per_batch), x.tensor_split(min(batches, tokens))
    for batch, part in enumerate(parts):
        collector.update(part, batch)
    stats = collector.stats("x")
    second = torch.cat([part[len(part) // 2 :] for part in parts])
    is_sampled = (second[:, None] == stats.sample).all(2).any(1)
    assert int(is_sampled.sum()) == len(stats.sample), "each sampled token once, all from the second halves"
    assert len(stats.sample) == sum(min(per_batch, -(-len(part) // 2)) for part in parts)
    first = torch.cat([part[: len(part) // 2] for part in parts])
    if not len(first):
        assert stats.unsampled_range is None
        assert stats.without_sample() is stats
        return
    assert stats.unsampled_range is not None
    assert torch.equal(stats.unsampled_range[0], first.amin(0))
    assert torch.equal(stats.unsampled_range[1], first.amax(0))
    assert torch.equal(stats.without_sample().absmax, first.abs().amax(0))


@pytest.mark.parametrize(("length", "per_batch"), [(64, 256), (512, 16), (512, 32), (100, 33)])
def test_the_sample_has_first_tokens_as_often_as_others(length: int, per_batch: int) -> None:
    rows, batches = max(1, 1024 // length), 32
    positions = torch.arange(length).repeat(rows).unsqueeze(1).float()
    collector = StatsCollector(per_batch)
    for batch in range(batches):
        collector.update(positions, batch)
    sample = collector.stats("x").sample
    early_share = int((sample < length // 16).sum()) / len(sample)
    assert 0.5 < early_share * length / (length // 16) < 2


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# For each architecture, the last linear of a block; None for experts, which run in any order.
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": (SMALL, "mlp.down_proj"), "phi": (SMALL, "mlp.fc2"), "qwen3_moe": (SMALL | EXPERTS, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_run_without_advancing_stops_early_with_the_same_statistics(kind: str) -> None:
    options, last = CASES[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    block, tokens = next(iter(find_blocks(model).values())), torch.randint(VOCABULARY, (8, 24))
    stats: list[dict[Weight, InputStats]] = []
    last_linear_calls: list[bool] = []
    with torch.no_grad(), Lanes(model, [block], batches_of(tokens, 2)) as lanes:
        trace = run_in_float32(block, lanes[0].waiting)
        if last is not None:
            block.get_submodule(last).register_forward_hook(lambda *call: last_linear_calls.append(True))
        for advance in (False, True):
            stats.append(
                calibrate(block, list(lanes), trace, needs_hessian_of=lambda weight: True, advance=advance)
            )
    assert len(last_linear_calls) == (0 if last is None else 4)  # once per lane, and only with advance=True
    without_advance, whole = stats
    assert without_advance.keys() == whole.keys()
    for weight, expected in whole.items():
        early_stats = without_advance[weight]
        assert early_stats.tokens == expected.tokens
        assert torch.equal(early_stats.sample, expected.sample)
        assert early_stats.hessian is not None
        assert expected.hessian is not None
        assert torch.equal(early_stats.hessian, expected.hessian)
