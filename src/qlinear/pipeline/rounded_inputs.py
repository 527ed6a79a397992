"""The pass that measures how rounding changes the inputs of a block, so that weights can be fitted to rounded inputs.

The smoothing of an input and its range follow from a first pass of the calibration set; only a second pass can tell
what rounding takes from it. The block runs smoothed but in float, on the output of the quantized blocks before it. The
idea of fitting to rounded inputs is GPTAQ's (Li et al. 2025); `algorithms.parts.input_error` has the formula.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms.base import Group, RoundedInput
from ..algorithms.parts.static_range import choose_static_range
from ..calibration.stats import add_outer_products, symmetrized
from ..runtime.distributed import Ranks
from ..streaming.lanes import Lane
from ..tracing.trace import Weight, watching_inputs
from .block import Block, BlockStats, MeasuredInput, RoundedInputs
from .options import Options
from .quantize_groups import smoothed_groups
from .smoothing import SmoothedBlock


def measure_rounded_inputs(
    block: Block,
    stats: BlockStats,
    smoothed: SmoothedBlock,
    lanes: Sequence[Lane],
    options: Options,
    ranks: Ranks,
) -> RoundedInputs:
    """How rounding changes the inputs that weights are fitted to, by the first weight of each group.

    lanes: the calibration set of this rank, waiting before the block; they stay there. ranks: the
    processes that have the other lanes.
    """
    fitted = [weight for weight in block.weights() if options.fits(block, weight)]
    smoothing = smoothed.smoothing
    sums = {
        members[0]: _InputSums(group, smoothing.migration.get(members[0]))
        for unit in stats.merge_groups(fitted)
        for members, group in smoothed_groups(block, stats, smoothing, unit, options)
    }
    if not sums:
        return {}

    def note(weight: Weight, x: Tensor) -> None:
        if weight in sums:
            sums[weight].add(x.float())

    with ranks.raising_together(), smoothing.applied_to(block.module), watching_inputs(block.module, note):
        for lane in lanes:
            lane.rehearse(lambda call: call.run())
    return {weight: input_sums.over(ranks) for weight, input_sums in sums.items()}


class _InputSums:
    """Sums over the tokens of one input, for the first half of each batch and for the second."""

    def __init__(self, group: Group, migration: Tensor | None) -> None:
        ranged = choose_static_range(group) if group.scheme.is_static else group
        self._group = replace(ranged, weights={}, sample=group.sample[:0], hessian=None)
        self._migration = migration
        self._halves = _Sums(group.low), _Sums(group.low)

    def add(self, x: Tensor) -> None:
        """Add tokens x (n, in), as the smoothed block has them."""
        if self._migration is not None:
            x = x / self._migration
        for sums, half in zip(self._halves, (x[: len(x) // 2], x[len(x) // 2 :]), strict=True):
            sums.add(half, self._group.rounded(half))

    def over(self, ranks: Ranks) -> MeasuredInput:
        """The means over the tokens of all ranks."""
        first, second = self._halves
        return MeasuredInput(self._group.low, self._group.high, (first.over(ranks), second.over(ranks)))


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
        sums = (self._hessian, self._drift, self._tokens)
        hessian, drift, tokens = (ranks.all_reduce(total) for total in sums)
        count = int(tokens)
        return RoundedInput(symmetrized(hessian.div_(max(1, count))), drift.div_(max(1, count)), count)
