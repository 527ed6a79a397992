"""The statistics of an input group from which its smoothing vector is computed.

A group has one vector, over the channels of its producer where a fold is known, else over the channels of its input.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..algorithms.smoothquant import smoothing_scale, weight_statistic
from ..tracing.folds import InputGroup
from ..tracing.trace import Weight

# Candidates for the part of a range below zero, relative to the part above, where codes have a zero point.
_SHARES_BELOW = tuple(i / 20 for i in range(20, 0, -1))


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Statistics of a group per channel (size,).

    absmax, absmean: of the activations; None for the group of an expert that saw no token. weight_absmax, weight_mean:
    of the weights' columns, in both forms of `weight_statistic`, over the rows of all weights. Grouped-query attention
    repeats a value head, so several input channels carry one producer channel; the largest statistic counts.
    """

    absmax: Tensor | None
    absmean: Tensor | None
    weight_absmax: Tensor
    weight_mean: Tensor

    @classmethod
    def of(
        cls,
        group: InputGroup,
        matrices: Mapping[Weight, Tensor],
        absmax: Mapping[Weight, Tensor],
        absmean: Mapping[Weight, Tensor],
        group_size: int | None = None,
    ) -> "GroupStatistics":
        """From matrices (out, in), and absmax and absmean (in,) of the weights that saw tokens."""
        largest = {w: weight_statistic([matrices[w]]) for w in group.weights}
        return cls(
            _per_channel(group, absmax) if absmax else None,
            _per_channel(group, absmean) if absmean else None,
            _per_channel(group, largest),
            _mean_per_channel(group, matrices, group_size),
        )

    def reaching(self, group: InputGroup, absmax: Mapping[Weight, Tensor]) -> "GroupStatistics":
        """The statistics with another absmax (in,) of the weights that saw tokens."""
        return replace(self, absmax=_per_channel(group, absmax) if absmax else None)

    def scale(self, alpha: float = 0.5, form: Literal["absmax", "mean", "awq"] = "absmax") -> Tensor:
        """s = a^alpha / w^(1 - alpha). form: absmax of both; absmax and the mean; or AWQ's two means, normalised."""
        w = self.weight_absmax if form == "absmax" else self.weight_mean
        a = self.absmean if form == "awq" else self.absmax
        if a is None:  # no statistics of activations: even out the weights, around 1
            return smoothing_scale(torch.ones_like(w), w, alpha, normalize=True)
        return smoothing_scale(a, w, alpha, normalize=form == "awq")


def group_scale(
    group: InputGroup, matrices: Mapping[Weight, Tensor], absmax: Mapping[Weight, Tensor], alpha: float
) -> Tensor:
    """SmoothQuant's vector of an input group (size,); see `GroupStatistics`."""
    w = _per_channel(group, {weight: weight_statistic([matrices[weight]]) for weight in group.weights})
    seen = {weight: absmax[weight] for weight in group.weights if weight in absmax}
    return GroupStatistics(_per_channel(group, seen) if seen else None, None, w, w).scale(alpha)


def _mean_per_channel(group: InputGroup, matrices: Mapping[Weight, Tensor], group_size: int | None) -> Tensor:
    """The "mean" statistic over the rows of all weights of a group; every row counts the same."""
    rows = {w: float(len(matrices[w])) for w in group.weights}
    sums = {w: weight_statistic([matrices[w]], "mean", group_size) * rows[w] for w in group.weights}
    counts = {w: torch.full_like(sums[w], rows[w]) for w in group.weights}
    return _gathered(group, sums).sum(0) / _gathered(group, counts).sum(0).clamp(min=1)


def _per_channel(group: InputGroup, of: Mapping[Weight, Tensor]) -> Tensor:
    """The largest of some weights' statistics (in,) at each of the producer's channels, or of the input's."""
    return _gathered(group, of).amax(0)


def _gathered(group: InputGroup, of: Mapping[Weight, Tensor]) -> Tensor:
    """Statistics (in,) of some weights of a group, (weights, size): at the producer's channels, or the input's."""
    if group.fold is None:
        return torch.stack(list(of.values()))
    size, readers = group.fold.producer.size, group.fold.readers
    return torch.stack([r.gather(of[r.weight], size) for r in readers if r.weight in of])


def flip_signs(
    group: InputGroup,
    matrices: Mapping[Weight, Tensor],
    low: Mapping[Weight, Tensor],
    high: Mapping[Weight, Tensor],
) -> tuple[Tensor, dict[Weight, Tensor]]:
    """Signs that make the larger end of every channel positive, and the reach of every channel then.

    With a zero point a range need not be symmetric. All channels share one range, and a channel with a large maximum
    may stand beside one with a large minimum. A vector may hold signs as well as sizes, since both are folded alike.
    With every larger end positive, a share b of the range suffices below zero. The reach of channel j is

        r_j = max(far_j, near_j / b)        b of least Σ_j ((1 + b) r_j)² |W_j|²

    The sum is the output error, up to a factor, if every channel fills the range; b = 1 gives the absmax.

    group: with a fold that holds for both signs (`tracing.proof.reversible`). matrices: (out, in). low, high: extremes
    (in,) of the weights that saw tokens. Returns signs (size,), 1 or -1, and r (in,) of each of these weights.
    """
    assert group.fold is not None
    above = _per_channel(group, {weight: x.clamp(min=0) for weight, x in high.items()})
    below = _per_channel(group, {weight: -x.clamp(max=0) for weight, x in low.items()})
    energy = _gathered(group, {w: matrices[w].square().sum(0) for w in group.weights}).sum(0)
    far, near = torch.maximum(above, below), torch.minimum(above, below)
    reaches = {share: torch.maximum(far, near / share) for share in _SHARES_BELOW}
    reach = reaches[min(reaches, key=lambda b: float((reaches[b].square() @ energy) * (1 + b) ** 2))]
    signs = torch.where(below > above, -1.0, 1.0)
    return signs, {
        reader.weight: reader.spread(reach) for reader in group.fold.readers if reader.weight in low
    }
