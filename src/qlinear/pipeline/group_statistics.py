"""The statistics of an input group that its smoothing vector is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..algorithms.smoothquant import smoothing_scale, weight_statistic
from ..tracing.folds import InputGroup
from ..tracing.trace import Weight

# How far a range with a zero point may reach below zero, as shares of how far it reaches above.
_SHARES_BELOW = tuple(i / 20 for i in range(20, 0, -1))


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What the smoothing vectors of an input group are made of: over its producer's channels, or its input's.

    absmax, absmean: of the activations (size,), None for a group that saw no token, an idle expert's. weight_absmax,
    weight_mean: of the weights' columns (size,), both forms of `weight_statistic` over the rows of all weights.
    Where several input channels carry one producer channel (grouped-query attention repeats a value head) the largest
    of their statistics counts.
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
        """Of matrices (out, in), and of absmax and absmean (in,) for the weights that saw tokens."""
        largest = {w: weight_statistic([matrices[w]]) for w in group.weights}
        return cls(
            _per_channel(group, absmax) if absmax else None,
            _per_channel(group, absmean) if absmean else None,
            _per_channel(group, largest),
            _mean_per_channel(group, matrices, group_size),
        )

    def reaching(self, group: InputGroup, absmax: Mapping[Weight, Tensor]) -> "GroupStatistics":
        """The same with another absmax (in,) of the weights that saw tokens."""
        return replace(self, absmax=_per_channel(group, absmax) if absmax else None)

    def scale(self, alpha: float = 0.5, form: Literal["absmax", "mean", "awq"] = "absmax") -> Tensor:
        """s = a^alpha / w^(1 - alpha). form: absmax of both; absmax and the mean; or AWQ's two means, normalised."""
        w = self.weight_absmax if form == "absmax" else self.weight_mean
        a = self.absmean if form == "awq" else self.absmax
        if a is None:  # nothing is known of the activations: the weights are evened out, around 1
            return smoothing_scale(torch.ones_like(w), w, alpha, normalize=True)
        return smoothing_scale(a, w, alpha, normalize=form == "awq")


def group_scale(
    group: InputGroup, matrices: Mapping[Weight, Tensor], absmax: Mapping[Weight, Tensor], alpha: float
) -> Tensor:
    """The one smoothing vector of an input group, as SmoothQuant has it; see `GroupStatistics`."""
    w = _per_channel(group, {weight: weight_statistic([matrices[weight]]) for weight in group.weights})
    seen = {weight: absmax[weight] for weight in group.weights if weight in absmax}
    return GroupStatistics(_per_channel(group, seen) if seen else None, None, w, w).scale(alpha)


def _mean_per_channel(group: InputGroup, matrices: Mapping[Weight, Tensor], group_size: int | None) -> Tensor:
    """The "mean" statistic over the rows of all weights of a group, as if they were one: each row counts alike."""
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
    """Signs that turn every channel's far end the same way, and how far each then reaches.

    Codes with a zero point need not reach as far below zero as above. What decides are all channels together, and one
    that reaches far up stands beside one that reaches far down. A sign is as free as a size is: of s it is folded
    alike. With all far ends above zero, a share b of the range is enough below it. Channel j then reaches

        r_j = max(far_j, near_j / b)        b of least Σ_j ((1 + b) r_j)² |W_j|²

    which is the error of the outputs where every channel fills the range, up to a factor; b = 1 gives the absmax.

    group: with a fold that holds for either sign (`structure.reversible`). matrices: (out, in). low, high: extremes
    (in,) of the weights that saw tokens. Returns signs (size,), 1 or -1, and r (in,) of each of those weights.
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
