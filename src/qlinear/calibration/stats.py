"""Statistics of a weight's input: collected batch by batch on each rank, then added up over the ranks.

`StatsCollector` (one rank, one input) -> `RankStats` (added with +) -> `InputStats` (the result).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericsError

# Columns of the Hessian that are updated at once. Only blocks on and right of the diagonal are computed.
_PANEL = 512
# Elements per chunk of tokens: a core's cache holds a float32 copy during several passes.
_CHUNK = 1 << 17
_INF = float("inf")
# Irrational numbers with an irrational ratio: sums of their multiples, modulo 1, cover [0, 1) evenly.
_SPREAD = (2**0.5, 3**0.5)


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of a weight's input, per channel over all tokens: vectors (in,) float32.

    tokens: their number. sample: some of the tokens (n, in), for measuring errors. hessian: the mean of x xᵀ (in, in)
    float32, None unless it was requested. unsampled_range: min and max over tokens outside the sample, None if there
    are none.
    """

    absmax: Tensor
    absmean: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    tokens: int
    sample: Tensor
    hessian: Tensor | None = None
    unsampled_range: tuple[Tensor, Tensor] | None = None

    def without_sample(self) -> "InputStats":
        """The statistics with the unsampled range, for choices that minimise the error on the sample."""
        if self.unsampled_range is None:
            return self
        low, high = self.unsampled_range
        return replace(self, min=low, max=high, absmax=torch.maximum(high, -low))


@dataclass(frozen=True, slots=True)
class RankStats:
    """One rank's statistics of an input: extremes and sums (in,), the number of tokens, and a sample of them.

    other_low, other_high: extremes of tokens outside the sample, infinite if there are none.
    """

    low: Tensor
    high: Tensor
    sum: Tensor
    abs_sum: Tensor
    tokens: int
    sample: Tensor
    other_low: Tensor
    other_high: Tensor

    def __add__(self, other: "RankStats") -> "RankStats":
        return RankStats(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), self.sum + other.sum,
            self.abs_sum + other.abs_sum, self.tokens + other.tokens, torch.cat([self.sample, other.sample]),
            torch.minimum(self.other_low, other.other_low), torch.maximum(self.other_high, other.other_high),
        )  # fmt: skip

    def stats(self, hessian: Tensor | None) -> InputStats:
        """The statistics. hessian: the sum of x xᵀ (in, in), upper blocks only; it is overwritten."""
        absmax = torch.maximum(self.high, -self.low)
        mean, absmean = self.sum / self.tokens, self.abs_sum / self.tokens
        whole = None if hessian is None else symmetrized(hessian.div_(self.tokens))
        has_others = bool((self.other_low <= self.other_high).all())
        others = (self.other_low, self.other_high) if has_others else None
        return InputStats(absmax, absmean, self.low, self.high, mean, self.tokens, self.sample, whole, others)


class StatsCollector:
    """Collects `RankStats` from one batch of tokens after another.

    Tuning a range on the tokens it was measured on overfits. So the sample comes from the second half of each batch,
    and the unsampled range from the first half. Halves, since tokens of one sequence resemble each other, and a batch
    usually holds several sequences.
    """

    def __init__(self, sample_per_batch: int, hessian: bool = False) -> None:
        self.tokens = 0
        self.hessian: Tensor | None = None
        self._wants_hessian = hessian
        self._sample_per_batch = sample_per_batch
        self._samples: list[Tensor] = []
        self._sums = self._extremes = self._others = torch.zeros(2, 0)

    def update(self, x: Tensor, batch: int = 0) -> None:
        """Add x (tokens, in), any float dtype. batch: number of the batch, which determines the sampled positions."""
        if x.shape[0] == 0:
            return
        if not self.tokens:
            self._sums = torch.zeros(2, x.shape[1], device=x.device)
            self._extremes, self._others = (
                torch.full_like(self._sums, _INF),
                torch.full_like(self._sums, _INF),
            )
        self.tokens += x.shape[0]
        if self._wants_hessian:
            self._add_hessian(x.float())
        first, second = x[: x.shape[0] // 2], x[x.shape[0] // 2 :]
        for rows in _chunks(first):
            torch.minimum(self._others, self._add_rows(rows), out=self._others)
        for rows in _chunks(second):
            self._add_rows(rows)
        self._samples.append(second[self._sample_rows(len(second), batch).to(x.device)])

    def _sample_rows(self, tokens: int, batch: int) -> Tensor:
        """Indices of the sampled tokens: one per run of `step` tokens, at a varying position within the run.

        Evenly spaced indices would pick the first token of every sequence, which is unlike all others, or never.
        """
        step = max(1, tokens // self._sample_per_batch)
        run = torch.arange(min(self._sample_per_batch, tokens // step), dtype=torch.float64)
        within = (run * _SPREAD[0] + batch * _SPREAD[1]) % 1 * step
        return (run * step + within).long()

    def _add_rows(self, x: Tensor) -> Tensor:
        """Add rows x; returns their extremes (2, in): the minimum, and the negated maximum."""
        ends = torch.stack([x.amin(0), -x.amax(0)])
        torch.minimum(self._extremes, ends, out=self._extremes)
        self._sums += torch.stack([x.sum(0), x.abs().sum(0)])
        return ends

    def _add_hessian(self, x: Tensor) -> None:
        """Add xᵀ x, upper blocks only."""
        if self.hessian is None:
            self.hessian = x.new_zeros(x.shape[1], x.shape[1])
        add_outer_products(self.hessian, x)

    def rank_stats(self, name: str) -> RankStats:
        """This rank's statistics. Raises NumericsError, with the weight's name, if there was NaN or infinity."""
        finite = torch.isfinite(self._extremes).all(0)
        if not bool(finite.all()):
            raise NumericsError(
                f"the input of {name} reached NaN or infinity in {int((~finite).sum())} of {len(finite)} channels "
                "during calibration: run it in a wider dtype with --dtype float32"
            )
        (low, high), (other_low, other_high), (total, magnitude) = self._extremes, self._others, self._sums
        sample = torch.cat(self._samples)
        return RankStats(low, -high, total, magnitude, self.tokens, sample, other_low, -other_high)

    def stats(self, name: str) -> InputStats:
        """The statistics if this is the only rank; no update is possible afterwards. Raises NumericsError."""
        return self.rank_stats(name).stats(self.hessian)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Chunks of rows of x (tokens, in) in float32 that fit a core's cache."""
    if len(x):
        yield from (rows.float() for rows in torch.split(x, max(1, _CHUNK // max(1, x.shape[1]))))


def add_outer_products(hessian: Tensor, x: Tensor) -> None:
    """Add xᵀ x of x (tokens, in) to `hessian` (in, in), upper blocks only."""
    for start in range(0, x.shape[1], _PANEL):
        panel = hessian[start : start + _PANEL, start:]
        panel.addmm_(x[:, start : start + _PANEL].T, x[:, start:])


def symmetrized(hessian: Tensor) -> Tensor:
    """`hessian` with its upper triangle mirrored to the lower one, in place."""
    for start in range(0, len(hessian), _PANEL):
        stop = start + _PANEL
        middle = hessian[start:stop, start:stop]
        middle.copy_(middle.triu() + middle.triu(1).T)
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    return hessian
