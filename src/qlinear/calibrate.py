"""Running a block over the calibration set once, and what is remembered of the inputs of its weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Lane
from .errors import NumericsError
from .structure import Trace, Weight, watching

SAMPLE_TOKENS = 256
# Columns of the second moments that are added to at once: only what stands on and right of the diagonal is computed.
_PANEL = 512
# Elements that stay in a core's cache while they are passed over several times.
_CHUNK = 1 << 17


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


class StatsCollector:
    """Gathers `InputStats` from one batch of tokens after another."""

    def __init__(self, sample_per_batch: int, second_moment: bool = False) -> None:
        self.tokens = 0
        self._moment: Tensor | None = None
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
        if self._moment is None:
            self._moment = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], _PANEL):
            panel = self._moment[start : start + _PANEL, start:]
            panel.addmm_(x[:, start : start + _PANEL].T, x[:, start:])

    def _whole_moment(self) -> Tensor | None:
        """The mean of x xᵀ, the part below the diagonal mirrored from above it."""
        if self._moment is None:
            return None
        self._moment.div_(self.tokens)
        for start in range(0, len(self._moment), _PANEL):
            stop = start + _PANEL
            middle = self._moment[start:stop, start:stop]
            middle.copy_(middle.triu() + middle.triu(1).T)
            self._moment[stop:, start:stop] = self._moment[start:stop, stop:].T
        return self._moment

    def stats(self, name: str) -> InputStats:
        """What was gathered. Raises NumericsError, with the weight's name, if there was NaN or infinity."""
        absmax = torch.maximum(self._high, -self._low)
        if not bool(torch.isfinite(absmax).all()):
            bad = int((~torch.isfinite(absmax)).sum())
            raise NumericsError(
                f"the input of {name} reached NaN or infinity in {bad} of {absmax.numel()} channels during "
                "calibration: run it in a wider dtype with --dtype float32"
            )
        mean, absmean = self._sum / self.tokens, self._abs_sum / self.tokens
        sample, moment = torch.cat(self._samples), self._whole_moment()
        return InputStats(absmax, absmean, self._low, self._high, mean, self.tokens, sample, moment)


def calibrate(
    block: nn.Module,
    lanes: Sequence[Lane],
    trace: Trace,
    prefix: str = "",
    *,
    second_moments: bool = False,
    advance: bool = True,
) -> dict[Weight, InputStats]:
    """Run `block` on what `lanes` wait with, and gather the statistics of every weight's input on the way.

    trace: a run of the block, which tells which weights read the very same tensor: those are measured once, and
    share one `InputStats`. prefix: the block's name, for messages. advance: whether the lanes go on with what came
    out; otherwise they stay where they are. A weight that saw no token is left out.
    """
    source = {p.weight: p.source for p in reversed(trace.products)}
    measured = {key: weight for weight, key in source.items()}
    per_batch = -(-SAMPLE_TOKENS // max(1, len(lanes)))
    collectors = {weight: StatsCollector(per_batch, second_moments) for weight in measured.values()}

    def note(weight: Weight, x: Tensor) -> None:
        if weight not in source:
            source[weight] = (weight,)
            measured[(weight,)] = weight
            collectors[weight] = StatsCollector(per_batch, second_moments)
        if weight in collectors:
            collectors[weight].update(x)

    with watching(block, note), torch.no_grad():
        for lane in lanes:
            if advance:
                lane.step()
            else:
                lane.waiting.run()
    seen = {w: c.stats(f"{prefix}.{w.module}") for w, c in collectors.items() if c.tokens}
    return {weight: seen[measured[key]] for weight, key in source.items() if measured[key] in seen}


def absmax_of(stats: Mapping[Weight, InputStats], weights: Iterable[Weight]) -> dict[Weight, Tensor]:
    """The absmax (in,) of each of `weights` that has statistics."""
    return {weight: stats[weight].absmax for weight in weights if weight in stats}
