"""A proof rejects every wrong fold, and accepts the right ones."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qlinear.streaming.find_blocks import shared_parameters
from qlinear.tracing.folds import find_groups
from qlinear.tracing.proof import find_and_prove_folds, prove, reversible, run_in_float32

from .blocks import EVERYTHING, WIDTH, GatedBlock, OnePlusNorm, call_of, described, folds_of, perturbed


class HiddenConsumer(GatedBlock):
    """Adds the norm's output to the result too, where no weight reads it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.down(self.middle(self.gate(h), self.up(h))) + 1e-3 * h.roll(1, -1)


class SharedValues(GatedBlock):
    """Leaves its values in a dict for a later block."""


class KeptValues(GatedBlock):
    """Leaves its values in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        y = super().forward(x, shared)
        self.values = shared["v"]
        return y


def is_refused(block: nn.Module, name: str, **kwargs: object) -> bool:
    """Whether the fold into `name` was suggested but not proved."""
    _, guessed, folds = folds_of(block, **kwargs)
    assert name in {fold.producer.name for fold in guessed}, "the experiments must suggest the wrong fold"
    return name not in {fold.producer.name for fold in folds}


def test_a_producer_with_a_hidden_second_consumer_is_refused() -> None:
    assert is_refused(perturbed(HiddenConsumer()), "norm2")


def test_a_hidden_consumer_behind_a_large_residual_is_refused() -> None:
    block = perturbed(HiddenConsumer())
    call = call_of(block, 2, 8)
    call.args[0][..., 0] = 1e6
    _, guessed, _ = folds_of(block)
    fold = next(fold for fold in guessed if fold.producer.name == "norm2")
    assert not prove(block, call, [fold])


def test_a_producer_that_a_later_block_reads_is_refused() -> None:
    assert is_refused(perturbed(SharedValues()), "attention.v", shared={})
    assert is_refused(perturbed(KeptValues()), "attention.v")


def test_a_clamp_that_bites_only_at_large_values_is_refused() -> None:
    block, free = perturbed(GatedBlock(clip=150.0)), perturbed(GatedBlock())
    call = call_of(block, 2, 8)
    v = block.attention.v(block.norm1(call.args[0]))
    assert v.abs().max() < 150 / 2**4, "the clamp has no effect on these tokens"
    _, _, folds = folds_of(free)
    fold = next(fold for fold in folds if fold.producer.name == "attention.v")
    assert prove(free, call_of(free, 2, 8), [fold])
    assert not prove(block, call, [fold])


def test_a_weight_that_another_block_shares_is_not_folded() -> None:
    first, second = perturbed(GatedBlock()), perturbed(GatedBlock())
    second.up = first.up
    shared = shared_parameters([first, second])
    assert shared[first] == {"up.weight", "up.bias"}
    _, folds = find_and_prove_folds(first, call_of(first, 16, 1), call_of(first, 2, 8), (), shared[first])
    assert {fold.producer.name for fold in folds} == {"norm1", "attention.v"}


def test_folds_that_the_previous_block_lacked_are_found() -> None:
    bare, block = perturbed(GatedBlock()), perturbed(GatedBlock())
    bare.norm1 = nn.Identity()
    _, previous_folds = find_and_prove_folds(bare, call_of(bare, 16, 1), call_of(bare, 2, 8))
    assert {fold.producer.name for fold in previous_folds} == {"norm2", "attention.v", "up"}
    trace, folds = find_and_prove_folds(block, call_of(block, 16, 1), call_of(block, 2, 8), previous_folds)
    assert described(find_groups(trace, folds)) == EVERYTHING


class Plain(GatedBlock):
    """One up projection, followed by a power of a ReLU."""

    def __init__(self, power: int) -> None:
        super().__init__()
        del self.gate
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.relu(self.up(self.norm2(x))) ** self.power)


@pytest.mark.parametrize("power", [1, 2])
def test_a_fold_behind_a_relu_does_not_hold_for_reversed_signs(power: int) -> None:
    block = perturbed(Plain(power))
    _, _, folds = folds_of(block)
    assert "up" in {fold.producer.name for fold in folds}
    sign_safe = reversible(block, call_of(block, 2, 8), folds)
    assert {fold.producer.name for fold in sign_safe} == {"norm1", "norm2", "attention.v"}


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), OnePlusNorm])
def test_every_fold_of_a_gated_block_holds_for_reversed_signs(norm: Callable[[], nn.Module]) -> None:
    block = perturbed(GatedBlock(norm))
    _, _, folds = folds_of(block)
    assert reversible(block, call_of(block, 2, 8), folds) == folds


def products_in(counter: FlopCounterMode) -> int:
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))


def test_a_proof_of_right_folds_multiplies_by_each_weight_once_per_magnitude() -> None:
    block = perturbed(GatedBlock())
    _, _, folds = folds_of(block)
    call = call_of(block, 2, 8)
    with FlopCounterMode(display=False) as once:
        plain = run_in_float32(block, call)
    with FlopCounterMode(display=False) as proof:
        assert prove(block, call, folds, plain)
    assert products_in(once) > 0
    # `plain` is the run at magnitude 1; the runs with the folds compute no product.
    assert products_in(proof) == 2 * products_in(once)
