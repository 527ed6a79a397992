"""Statistics of what a weight reads, gathered batch by batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericsError

# Columns of the second moments that are added to at once: only what stands on and right of the diagonal is computed.
_PANEL = 512


# Elements that stay in a core's cache while they are passed over several times.
_CHUNK = 1 << 17


_INF = float("inf")


# Irrational, and so are their ratios: sums of multiples of them, modulo 1, are spread evenly over [0, 1).
_SPREAD = (2**0.5, 3**0.5)


@dataclass(frozen=True, slots=True)
class InputStats:
    """Statistics of what a weight reads, per input channel over all tokens: each (in,) float32.

    tokens: how many there were. sample: a few of them (n, in), for measuring errors. moment: the mean of x xᵀ (in, in)
    float32, None unless it was asked for. others: min and max of tokens apart from the sample, None if there are none.
    """

    absmax: Tensor
    absmean: Tensor
    min: Tensor
    max: Tensor
    mean: Tensor
    tokens: int
    sample: Tensor
    hessian: Tensor | None = None
    others: tuple[Tensor, Tensor] | None = None

    def without_sample(self) -> "InputStats":
        """The same with the extremes of the other tokens, for choices that are made by the error on the sample."""
        if self.others is None:
            return self
        low, high = self.others
        return replace(self, min=low, max=high, absmax=torch.maximum(high, -low))


@dataclass(frozen=True, slots=True)
class Gathered:
    """What one rank saw of an input: extremes and sums (in,), the number of its tokens, a few of them, and the extremes
    of those that are apart from these, infinite if there are none."""

    low: Tensor
    high: Tensor
    sum: Tensor
    abs_sum: Tensor
    tokens: int
    sample: Tensor
    other_low: Tensor
    other_high: Tensor

    def __add__(self, other: "Gathered") -> "Gathered":
        return Gathered(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), self.sum + other.sum,
            self.abs_sum + other.abs_sum, self.tokens + other.tokens, torch.cat([self.sample, other.sample]),
            torch.minimum(self.other_low, other.other_low), torch.maximum(self.other_high, other.other_high),
        )  # fmt: skip

    def stats(self, hessian: Tensor | None) -> InputStats:
        """The statistics; `moment` is the sum of x xᵀ, on and above the diagonal's blocks, which is used up."""
        absmax = torch.maximum(self.high, -self.low)
        mean, absmean = self.sum / self.tokens, self.abs_sum / self.tokens
        whole = None if hessian is None else symmetrized(hessian.div_(self.tokens))
        others = (
            (self.other_low, self.other_high) if bool((self.other_low <= self.other_high).all()) else None
        )
        return InputStats(absmax, absmean, self.low, self.high, mean, self.tokens, self.sample, whole, others)


class StatsCollector:
    """Gathers `InputStats` from one batch of tokens after another.

    A range that is chosen by the error on some tokens must not know how far those reach, or it would promise too much
    for all that are still to come. So the sample is from the second half of each batch, and the ranges apart from it
    are those of the first: tokens of one sequence are alike, and a batch is mostly several.
    """

    def __init__(self, sample_per_batch: int, hessian: bool = False) -> None:
        self.tokens = 0
        self.hessian: Tensor | None = None
        self._wants_hessian = hessian
        self._sample_per_batch = sample_per_batch
        self._samples: list[Tensor] = []
        self._sums = self._extremes = self._others = torch.zeros(2, 0)

    def update(self, x: Tensor, batch: int = 0) -> None:
        """Take in x (tokens, in), any float dtype, of a batch: where its sample begins depends on which that is."""
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
            torch.minimum(self._others, self._add(rows), out=self._others)
        for rows in _chunks(second):
            self._add(rows)
        self._samples.append(second[self._choice(len(second), batch).to(x.device)])

    def _choice(self, tokens: int, batch: int) -> Tensor:
        """Which of so many tokens are the sample: one of each run of some, now an early one, now a late. Evenly spaced,
        they would be the first of every sequence, which are unlike all others, or none of them."""
        step = max(1, tokens // self._sample_per_batch)
        run = torch.arange(min(self._sample_per_batch, tokens // step), dtype=torch.float64)
        within = (run * _SPREAD[0] + batch * _SPREAD[1]) % 1 * step
        return (run * step + within).long()

    def _add(self, x: Tensor) -> Tensor:
        """Add rows x; returns their extremes (2, in): the least, and the greatest negated."""
        ends = torch.stack([x.amin(0), -x.amax(0)])
        torch.minimum(self._extremes, ends, out=self._extremes)
        self._sums += torch.stack([x.sum(0), x.abs().sum(0)])
        return ends

    def _add_hessian(self, x: Tensor) -> None:
        """Add xᵀ x, on and above the diagonal's blocks."""
        if self.hessian is None:
            self.hessian = x.new_zeros(x.shape[1], x.shape[1])
        add_outer_products(self.hessian, x)

    def gathered(self, name: str) -> Gathered:
        """What was gathered. Raises NumericsError, with the weight's name, if there was NaN or infinity."""
        finite = torch.isfinite(self._extremes).all(0)
        if not bool(finite.all()):
            raise NumericsError(
                f"the input of {name} reached NaN or infinity in {int((~finite).sum())} of {len(finite)} channels "
                "during calibration: run it in a wider dtype with --dtype float32"
            )
        (low, high), (other_low, other_high), (total, magnitude) = self._extremes, self._others, self._sums
        sample = torch.cat(self._samples)
        return Gathered(low, -high, total, magnitude, self.tokens, sample, other_low, -other_high)

    def stats(self, name: str) -> InputStats:
        """The statistics, where nobody else saw tokens; nothing can be taken in afterwards. Raises NumericsError."""
        return self.gathered(name).stats(self.hessian)


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Rows of x (tokens, in) that fit a core's cache, float32."""
    if len(x):
        yield from (rows.float() for rows in torch.split(x, max(1, _CHUNK // max(1, x.shape[1]))))


def add_outer_products(hessian: Tensor, x: Tensor) -> None:
    """Add xᵀ x of x (tokens, in) to a moment (in, in), on and above the diagonal's blocks."""
    for start in range(0, x.shape[1], _PANEL):
        panel = hessian[start : start + _PANEL, start:]
        panel.addmm_(x[:, start : start + _PANEL].T, x[:, start:])


def symmetrized(hessian: Tensor) -> Tensor:
    """A symmetric matrix with what is above the diagonal mirrored to below it, in place."""
    for start in range(0, len(hessian), _PANEL):
        stop = start + _PANEL
        middle = hessian[start:stop, start:stop]
        middle.copy_(middle.triu() + middle.triu(1).T)
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    return hessian
