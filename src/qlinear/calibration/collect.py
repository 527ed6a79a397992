"""Running a block over the calibration set once, and what is remembered of the inputs of its weights."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from ..runtime.distributed import Ranks
from ..streaming.lanes import Lane
from ..tracing.experiment import Trace
from ..tracing.trace import Weight, watching_inputs
from .stats import Gathered, InputStats, StatsCollector

SAMPLE_TOKENS = 512
_ALONE = Ranks()


class _Enough(BaseException):
    """All has been seen that was to be seen of a block; not an Exception, so that no model swallows it."""


def calibrate(
    block: nn.Module,
    lanes: Sequence[Lane],
    trace: Trace,
    prefix: str = "",
    *,
    needs_hessian_of: Callable[[Weight], bool] = lambda weight: False,
    advance: bool = True,
    ranks: Ranks = _ALONE,
) -> dict[Weight, InputStats]:
    """Run `block` on what `lanes` wait with, and gather the statistics of every weight's input on the way.

    trace: a run of the block, which tells which weights read the very same tensor: those are measured once, and
    share one `InputStats`. prefix: the block's name, for messages. second_moments: which weights' are asked for.
    advance: whether the lanes go on with what came out; otherwise they stay where they are. ranks: those that have the
    other lanes of the calibration set; all get the statistics of the whole. A weight that saw no token is left out.
    """
    source = {p.weight: p.source for p in reversed(trace.products)}
    measured = {key: weight for weight, key in source.items()}
    batches = ranks.gather(lambda: len(lanes))
    per_batch, first = -(-SAMPLE_TOKENS // max(1, sum(batches))), sum(batches[: ranks.rank])
    asked = {measured[key] for weight, key in source.items() if needs_hessian_of(weight)}
    collectors = {weight: StatsCollector(per_batch, weight in asked) for weight in measured.values()}
    last, batch = None if advance else _last(block, trace), first

    def note(weight: Weight, x: Tensor) -> None:
        if weight not in source:  # an expert that no token of the trace has reached
            collectors.setdefault(weight, StatsCollector(per_batch, needs_hessian_of(weight)))
        if weight in collectors:
            collectors[weight].update(x, batch)
        if weight == last:
            raise _Enough

    def gather() -> dict[Weight, Gathered]:
        nonlocal batch
        with watching_inputs(block, note), torch.no_grad():
            for lane in lanes:
                batch += 1
                if advance:
                    lane.step()
                else:
                    lane.rehearse(lambda call: call.run_until(_Enough))
        return {w: c.gathered(f"{prefix}.{w.module}") for w, c in collectors.items() if c.tokens}

    parts = ranks.gather(gather)
    seen: dict[Weight, InputStats] = {}
    for weight in dict.fromkeys(weight for part in parts for weight in part):
        total = reduce(operator.add, (part[weight] for part in parts if weight in part))
        wanted = weight in asked or (weight not in source and needs_hessian_of(weight))
        hessian = _hessian(collectors.get(weight), total, ranks) if wanted else None
        seen[weight] = total.stats(hessian)
    of = {weight: measured[key] for weight, key in source.items()} | {w: w for w in seen if w not in source}
    return {weight: seen[one] for weight, one in of.items() if one in seen}


def _last(block: nn.Module, trace: Trace) -> Weight | None:
    """The weight of a block after whose input there is none to see; None where not all took part in the trace, such as
    experts, or it took part more than once."""
    matrices = {name for name, parameter in block.named_parameters() if parameter.dim() > 1}
    weights = [product.weight for product in trace.products]
    is_last = matrices == {w.name for w in weights} and weights.count(weights[-1]) == 1
    return weights[-1] if is_last and weights[-1].index is None else None


def _hessian(collector: StatsCollector | None, total: Gathered, ranks: Ranks) -> Tensor:
    """The sum of x xᵀ over all ranks (in, in), on and above the diagonal's blocks."""
    if collector is None or collector.hessian is None:
        return ranks.all_reduce(total.low.new_zeros(len(total.low), len(total.low)))
    return ranks.all_reduce(collector.hessian)


def absmax_of(stats: Mapping[Weight, InputStats], weights: Iterable[Weight]) -> dict[Weight, Tensor]:
    """The absmax (in,) of each of `weights` that has statistics."""
    return {weight: stats[weight].absmax for weight in weights if weight in stats}
