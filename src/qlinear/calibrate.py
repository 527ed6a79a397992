"""Running a block over the calibration set once, and what is remembered of the inputs of its weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Lane
from .errors import NumericsError
from .structure import Trace, Weight, watching

SAMPLE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of what a weight reads, per input channel over all tokens: each (in,) float32.

    tokens: how many there were. sample: a few of them (n, in), for measuring errors.
    """

    absmax: Tensor
    absmean: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    tokens: int
    sample: Tensor


class StatsCollector:
    """Gathers `InputStats` from one batch of tokens after another."""

    def __init__(self, sample_per_batch: int) -> None:
        self.tokens = 0
        self._sample_per_batch = sample_per_batch
        self._samples: list[Tensor] = []
        self._low = self._high = self._sum = self._abs_sum = torch.zeros(())

    def update(self, x: Tensor) -> None:
        """Take in x (tokens, in), any float dtype."""
        if x.shape[0] == 0:
            return
        # Reductions only: a temporary as large as x costs more than the sums do.
        low, high = x.amin(0).float(), x.amax(0).float()
        total, magnitude = (
            x.sum(0, dtype=torch.float32),
            torch.linalg.vector_norm(x, 1, 0, dtype=torch.float32),
        )
        if self.tokens:
            low, high = torch.minimum(low, self._low), torch.maximum(high, self._high)
            total, magnitude = total + self._sum, magnitude + self._abs_sum
        self._low, self._high, self._sum, self._abs_sum = low, high, total, magnitude
        self.tokens += x.shape[0]
        step = max(1, x.shape[0] // self._sample_per_batch)
        self._samples.append(x[::step][: self._sample_per_batch].clone())

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
        return InputStats(absmax, absmean, self._low, self._high, mean, self.tokens, torch.cat(self._samples))


def calibrate(
    block: nn.Module, lanes: Sequence[Lane], trace: Trace, prefix: str = ""
) -> dict[Weight, InputStats]:
    """Step `lanes` through `block`, and gather the statistics of every weight's input on the way.

    trace: a run of the block, which tells which weights read the very same tensor: those are measured once, and
    share one `InputStats`. prefix: the block's name, for messages. A weight that saw no token is left out.
    """
    source = {p.weight: p.source for p in reversed(trace.products)}
    measured = {key: weight for weight, key in source.items()}
    per_batch = -(-SAMPLE_TOKENS // max(1, len(lanes)))
    collectors = {weight: StatsCollector(per_batch) for weight in measured.values()}

    def note(weight: Weight, x: Tensor) -> None:
        if weight not in source:
            source[weight] = (weight,)
            measured[(weight,)] = weight
            collectors[weight] = StatsCollector(per_batch)
        if weight in collectors:
            collectors[weight].update(x)

    with watching(block, note), torch.no_grad():
        for lane in lanes:
            lane.step()
    seen = {w: c.stats(f"{prefix}.{w.module}") for w, c in collectors.items() if c.tokens}
    return {weight: seen[measured[key]] for weight, key in source.items() if measured[key] in seen}


def absmax_of(stats: Mapping[Weight, InputStats], weights: Iterable[Weight]) -> dict[Weight, Tensor]:
    """The absmax (in,) of each of `weights` that has statistics."""
    return {weight: stats[weight].absmax for weight in weights if weight in stats}
