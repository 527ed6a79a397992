"""Runs a block once over the calibration set and collects the statistics of its weights' inputs.

Every lane, a micro-batch of the calibration set, runs through the block. Weights that read the same
tensor share one collector. With several ranks, each rank runs its own lanes, and all ranks get the statistics of the
whole set.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from ..runtime.distributed import Ranks
from ..streaming.lanes import Lane
from ..tracing.experiment import Trace
from ..tracing.trace import Weight, watching_inputs
from .stats import InputStats, RankStats, StatsCollector

SAMPLE_TOKENS = 512
_ONE_RANK = Ranks()


class _LastInputSeen(BaseException):
    """Ends a block's run after the last input of interest. Not an Exception, so that no model catches it."""


def calibrate(
    block: nn.Module,
    lanes: Sequence[Lane],
    trace: Trace,
    prefix: str = "",
    *,
    needs_hessian_of: Callable[[Weight], bool] = lambda weight: False,
    advance: bool = True,
    ranks: Ranks = _ONE_RANK,
) -> dict[Weight, InputStats]:
    """Run `block` on every lane, and return the statistics of every weight's input.

    trace: a run of the block; weights that read the same tensor in it are measured once and share one `InputStats`.
    prefix: the block's name, for messages. needs_hessian_of: whether a weight needs the Hessian. advance: whether the
    lanes continue with the block's output; otherwise they stay before the block. ranks: the processes that hold the
    other lanes. A weight without tokens is left out. Raises NumericsError on NaN or infinity.
    """
    batches = ranks.gather(lambda: len(lanes))
    per_batch, first = -(-SAMPLE_TOKENS // max(1, sum(batches))), sum(batches[: ranks.rank])
    collected = _BlockStats(
        block, trace, needs_hessian_of, per_batch, None if advance else _last_weight(block, trace)
    )

    def run_lanes() -> dict[Weight, RankStats]:
        with watching_inputs(block, collected.on_input), torch.no_grad():
            for batch, lane in enumerate(lanes, first + 1):
                collected.batch = batch
                if advance:
                    lane.step()
                else:
                    lane.rehearse(lambda call: call.run_until(_LastInputSeen))
        return collected.rank_stats(prefix)

    return collected.total(ranks.gather(run_lanes), ranks)


class _BlockStats:
    """The collectors of one block on one rank: one for each tensor that weights read.

    An expert that no token of the trace reached has no known source; it gets a collector of its own with its first
    tokens.
    """

    def __init__(
        self,
        block: nn.Module,
        trace: Trace,
        needs_hessian_of: Callable[[Weight], bool],
        sample_per_batch: int,
        last: Weight | None,
    ) -> None:
        self._needs_hessian_of, self._sample_per_batch, self._last = needs_hessian_of, sample_per_batch, last
        self._source = {p.weight: p.source for p in reversed(trace.products)}
        # For each source, the weight whose input is measured.
        self._measured = {key: weight for weight, key in self._source.items()}
        self._with_hessian = {self._measured[key] for w, key in self._source.items() if needs_hessian_of(w)}
        self._collectors = {
            weight: StatsCollector(sample_per_batch, weight in self._with_hessian)
            for weight in self._measured.values()
        }
        self.batch = 0

    def on_input(self, weight: Weight, x: Tensor) -> None:
        """Add the input x (tokens, in) of a weight. Raises _LastInputSeen after the last weight of interest."""
        if weight not in self._source:
            new = StatsCollector(self._sample_per_batch, self._needs_hessian_of(weight))
            self._collectors.setdefault(weight, new)
        if weight in self._collectors:
            self._collectors[weight].update(x, self.batch)
        if weight == self._last:
            raise _LastInputSeen

    def rank_stats(self, prefix: str) -> dict[Weight, RankStats]:
        """This rank's statistics of the measured weights that saw tokens."""
        return {w: c.rank_stats(f"{prefix}.{w.module}") for w, c in self._collectors.items() if c.tokens}

    def total(self, parts: Sequence[dict[Weight, RankStats]], ranks: Ranks) -> dict[Weight, InputStats]:
        """The statistics of every weight over all ranks, from each rank's part."""
        measured: dict[Weight, InputStats] = {}
        for weight in dict.fromkeys(weight for part in parts for weight in part):
            summed = reduce(operator.add, (part[weight] for part in parts if weight in part))
            measured[weight] = summed.stats(self._hessian(weight, summed, ranks))
        shared = {weight: self._measured[key] for weight, key in self._source.items()}
        shared |= {weight: weight for weight in measured if weight not in self._source}
        return {weight: measured[first] for weight, first in shared.items() if first in measured}

    def _hessian(self, weight: Weight, summed: RankStats, ranks: Ranks) -> Tensor | None:
        """The sum of x xᵀ over all ranks (in, in), upper blocks only; None if the weight does not need it."""
        late = weight not in self._source and self._needs_hessian_of(weight)
        if not (late or weight in self._with_hessian):
            return None
        collector = self._collectors.get(weight)
        if collector is None or collector.hessian is None:
            return ranks.all_reduce(summed.low.new_zeros(len(summed.low), len(summed.low)))
        return ranks.all_reduce(collector.hessian)


def _last_weight(block: nn.Module, trace: Trace) -> Weight | None:
    """The last weight to read an input; None if it is used twice, or if a weight, such as an expert, was not used."""
    matrices = {name for name, parameter in block.named_parameters() if parameter.dim() > 1}
    weights = [product.weight for product in trace.products]
    is_last = matrices == {w.name for w in weights} and weights.count(weights[-1]) == 1
    return weights[-1] if is_last and weights[-1].index is None else None


def absmax_of(stats: Mapping[Weight, InputStats], weights: Iterable[Weight]) -> dict[Weight, Tensor]:
    """The absmax (in,) of each of `weights` that has statistics."""
    return {weight: stats[weight].absmax for weight in weights if weight in stats}
