"""Running a block over the calibration set once, and what is remembered of the inputs of its weights."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from .blocks import Lane
from .errors import NumericsError
from .ranks import Ranks
from .structure import Trace, Weight, watching

SAMPLE_TOKENS = 256
# Columns of the second moments that are added to at once: only what stands on and right of the diagonal is computed.
_PANEL = 512
# Elements that stay in a core's cache while they are passed over several times.
_CHUNK = 1 << 17
_ALONE = Ranks()


class _Enough(BaseException):
    """All has been seen that was to be seen of a block; not an Exception, so that no model swallows it."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of what a weight reads, per input channel over all tokens: each (in,) float32.

    tokens: how many there were. sample: a few of them (n, in), for measuring errors. moment: the mean of x xᵀ (in, in)
    float32, None unless it was asked for.
    """

    absmax: Tensor
    absmean: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    tokens: int
    sample: Tensor
    moment: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """What one rank saw of an input: its extremes and sums (in,), the number of its tokens, and a few of them."""

    low: Tensor
    high: Tensor
    sum: Tensor
    abs_sum: Tensor
    tokens: int
    sample: Tensor

    def __add__(self, other: "Gathered") -> "Gathered":
        return Gathered(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), self.sum + other.sum,
            self.abs_sum + other.abs_sum, self.tokens + other.tokens, torch.cat([self.sample, other.sample]),
        )  # fmt: skip

    def stats(self, moment: Tensor | None) -> InputStats:
        """The statistics; `moment` is the sum of x xᵀ, on and above the diagonal's blocks, which is used up."""
        absmax = torch.maximum(self.high, -self.low)
        mean, absmean = self.sum / self.tokens, self.abs_sum / self.tokens
        whole = None if moment is None else _whole(moment.div_(self.tokens))
        return InputStats(absmax, absmean, self.low, self.high, mean, self.tokens, self.sample, whole)


class StatsCollector:
    """Gathers `InputStats` from one batch of tokens after another."""

    def __init__(self, sample_per_batch: int, second_moment: bool = False) -> None:
        self.tokens = 0
        self.moment: Tensor | None = None
        self._second_moment = second_moment
        self._sample_per_batch = sample_per_batch
        self._samples: list[Tensor] = []
        self._low = self._high = self._sum = self._abs_sum = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Take in x (tokens, in), any float dtype."""
        if x.shape[0] == 0:
            return
        for rows in torch.split(x, max(1, _CHUNK // max(1, x.shape[1]))):
            self._add(rows.float())
        self.tokens += x.shape[0]
        if self._second_moment:
            self._add_moment(x.float())
        step = max(1, x.shape[0] // self._sample_per_batch)
        self._samples.append(x[::step][: self._sample_per_batch].clone())

    def _add(self, x: Tensor) -> None:
        low, high, total, magnitude = x.amin(0), x.amax(0), x.sum(0), x.abs().sum(0)
        if self._low.dim():
            low, high = torch.minimum(low, self._low), torch.maximum(high, self._high)
            total, magnitude = total + self._sum, magnitude + self._abs_sum
        self._low, self._high, self._sum, self._abs_sum = low, high, total, magnitude

    def _add_moment(self, x: Tensor) -> None:
        """Add xᵀ x, on and above the diagonal's blocks."""
        if self.moment is None:
            self.moment = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], _PANEL):
            panel = self.moment[start : start + _PANEL, start:]
            panel.addmm_(x[:, start : start + _PANEL].T, x[:, start:])

    def gathered(self, name: str) -> Gathered:
        """What was gathered. Raises NumericsError, with the weight's name, if there was NaN or infinity."""
        absmax = torch.maximum(self._high, -self._low)
        if not bool(torch.isfinite(absmax).all()):
            bad = int((~torch.isfinite(absmax)).sum())
            raise NumericsError(
                f"the input of {name} reached NaN or infinity in {bad} of {absmax.numel()} channels during "
                "calibration: run it in a wider dtype with --dtype float32"
            )
        return Gathered(
            self._low, self._high, self._sum, self._abs_sum, self.tokens, torch.cat(self._samples)
        )

    def stats(self, name: str) -> InputStats:
        """The statistics, where nobody else saw tokens; nothing can be taken in afterwards. Raises NumericsError."""
        return self.gathered(name).stats(self.moment)


def _whole(moment: Tensor) -> Tensor:
    """Mirror what is above the diagonal of a symmetric matrix to below it, in place."""
    for start in range(0, len(moment), _PANEL):
        stop = start + _PANEL
        middle = moment[start:stop, start:stop]
        middle.copy_(middle.triu() + middle.triu(1).T)
        moment[stop:, start:stop] = moment[start:stop, stop:].T
    return moment


def calibrate(
    block: nn.Module,
    lanes: Sequence[Lane],
    trace: Trace,
    prefix: str = "",
    *,
    second_moments: bool = False,
    advance: bool = True,
    ranks: Ranks = _ALONE,
) -> dict[Weight, InputStats]:
    """Run `block` on what `lanes` wait with, and gather the statistics of every weight's input on the way.

    trace: a run of the block, which tells which weights read the very same tensor: those are measured once, and
    share one `InputStats`. prefix: the block's name, for messages. advance: whether the lanes go on with what came
    out; otherwise they stay where they are. ranks: those that have the other lanes of the calibration set; all get
    the statistics of the whole. A weight that saw no token is left out.
    """
    source = {p.weight: p.source for p in reversed(trace.products)}
    measured = {key: weight for weight, key in source.items()}
    per_batch = -(-SAMPLE_TOKENS // max(1, sum(ranks.each(lambda: len(lanes)))))
    collectors = {weight: StatsCollector(per_batch, second_moments) for weight in measured.values()}
    last = None if advance else _last(block, trace)

    def note(weight: Weight, x: Tensor) -> None:
        if weight not in source:  # an expert that no token of the trace has reached
            collectors.setdefault(weight, StatsCollector(per_batch, second_moments))
        if weight in collectors:
            collectors[weight].update(x)
        if weight == last:
            raise _Enough

    def gather() -> dict[Weight, Gathered]:
        with watching(block, note), torch.no_grad():
            for lane in lanes:
                if advance:
                    lane.step()
                else:
                    lane.rehearse(lambda call: call.run_until(_Enough))
        return {w: c.gathered(f"{prefix}.{w.module}") for w, c in collectors.items() if c.tokens}

    parts = ranks.each(gather)
    seen: dict[Weight, InputStats] = {}
    for weight in dict.fromkeys(weight for part in parts for weight in part):
        total = reduce(operator.add, (part[weight] for part in parts if weight in part))
        moment = _moment(collectors.get(weight), total, ranks) if second_moments else None
        seen[weight] = total.stats(moment)
    of = {weight: measured[key] for weight, key in source.items()} | {w: w for w in seen if w not in source}
    return {weight: seen[one] for weight, one in of.items() if one in seen}


def _last(block: nn.Module, trace: Trace) -> Weight | None:
    """The weight of a block after whose input there is none to see; None where not all took part in the trace, such as
    experts, or it took part more than once."""
    matrices = {name for name, parameter in block.named_parameters() if parameter.dim() > 1}
    weights = [product.weight for product in trace.products]
    is_last = matrices == {w.name for w in weights} and weights.count(weights[-1]) == 1
    return weights[-1] if is_last and weights[-1].index is None else None


def _moment(collector: StatsCollector | None, total: Gathered, ranks: Ranks) -> Tensor:
    """The sum of x xᵀ over all ranks (in, in), on and above the diagonal's blocks."""
    if collector is None or collector.moment is None:
        return ranks.add_up(total.low.new_zeros(len(total.low), len(total.low)))
    return ranks.add_up(collector.moment)


def absmax_of(stats: Mapping[Weight, InputStats], weights: Iterable[Weight]) -> dict[Weight, Tensor]:
    """The absmax (in,) of each of `weights` that has statistics."""
    return {weight: stats[weight].absmax for weight in weights if weight in stats}
