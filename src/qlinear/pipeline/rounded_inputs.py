"""The pass that shows what rounding makes of the inputs of a block, for GPTQ to fit the weights to (`algorithms.fit`).

How an input is smoothed and what its range is follows from a pass of the calibration set; only then can another tell
what is lost of it. The block runs smoothed but in float, on what the quantized blocks before it give.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms.base import Group, RoundedInput
from ..calibration.stats import add_outer_products, symmetrized
from ..runtime.distributed import Ranks
from ..streaming.lanes import Lane
from ..tracing.trace import Weight, watching_inputs
from .block_state import Findings, Recipe
from .quantize_groups import smoothed_groups


def rounded_inputs(
    found: Findings, lanes: Sequence[Lane], recipe: Recipe, ranks: Ranks
) -> dict[Weight, tuple[RoundedInput, RoundedInput]]:
    """What rounding makes of the inputs that linears of a smoothed block are fitted to, by the first of each unit.

    lanes: stay where they are. ranks: those that have the others.
    """
    single = [weight for weight in found.weights() if recipe.fits(found, weight)]
    sums = {
        members[0]: _Halves(group, found.smoothing.migration.get(members[0]))
        for unit in found.merge_groups(single)
        for members, group in smoothed_groups(found, unit, recipe)
    }
    if not sums:
        return {}

    def note(weight: Weight, x: Tensor) -> None:
        if weight in sums:
            sums[weight].add(x.float())

    with ranks.raising_together(), _smoothed(found), watching_inputs(found.block, note):
        for lane in lanes:
            lane.rehearse(lambda call: call.run())
    return {weight: each.over(ranks) for weight, each in sums.items()}


class _Halves:
    """Sums over the tokens of one input, for the first half of each batch and for the second: they are mostly of
    different sequences."""

    def __init__(self, group: Group, migration: Tensor | None) -> None:
        self._group = replace(group, weights={}, sample=group.sample[:0], hessian=None)
        self._migration = migration
        self._sums = _Sums(group.low), _Sums(group.low)

    def add(self, x: Tensor) -> None:
        """Take in tokens x (n, in) as the smoothed block has them."""
        if self._migration is not None:
            x = x / self._migration
        for sums, half in zip(self._sums, (x[: len(x) // 2], x[len(x) // 2 :]), strict=True):
            sums.add(half, self._group.rounded(half))

    def over(self, ranks: Ranks) -> tuple[RoundedInput, RoundedInput]:
        """The means over the tokens of all ranks."""
        first, second = self._sums
        return first.over(ranks), second.over(ranks)


class _Sums:
    """Sums over tokens; see `RoundedInput`. like: (in,), for device and dtype."""

    def __init__(self, like: Tensor) -> None:
        self._hessian, self._drift = (like.new_zeros(len(like), len(like)) for _ in range(2))
        self._tokens = torch.zeros(1, dtype=torch.int64)

    def add(self, x: Tensor, rounded: Tensor) -> None:
        add_outer_products(self._hessian, rounded)
        self._drift.addmm_((x - rounded).T, rounded)
        self._tokens += len(x)

    def over(self, ranks: Ranks) -> RoundedInput:
        hessian, drift, tokens = (
            ranks.all_reduce(each) for each in (self._hessian, self._drift, self._tokens)
        )
        count = int(tokens)
        return RoundedInput(symmetrized(hessian.div_(max(1, count))), drift.div_(max(1, count)), count)


@contextmanager
def _smoothed(found: Findings) -> Iterator[None]:
    """While open, the block computes with its weights smoothed; then they are again as they were."""
    touched = [weight for weight in found.weights() if found.smoothing.touches(weight)]
    before = [weight.of(found.block).detach().clone() for weight in touched]
    for weight in touched:
        found.smoothing.apply_in_place(weight, weight.of(found.block).detach())
    try:
        yield
    finally:
        for weight, matrix in zip(touched, before, strict=True):
            weight.of(found.block).detach().copy_(matrix)
