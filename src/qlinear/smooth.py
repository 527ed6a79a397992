"""Smoothing: moving the difficulty of outlier channels from the activations to the weights.

    y = x Wᵀ + b = (x / s) (W · diag(s))ᵀ + b          s (in,)

With per-token int8 activations a channel 50 times larger than the rest leaves the rest two codes to live on.
Dividing it by s makes it ordinary; the weight's column, multiplied by s, can carry it (SmoothQuant, Xiao et al.
2022, eq. 3-4). The division costs nothing where a producer can take it: a norm's gain, or the rows of the linear
that made the channel. Where none can, `s` stays with the layer as its migration scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import SchemeError
from .structure import Fold, InputGroup, Producer, Weight

_MINIMUM = 1e-5
# How far a range with a zero point may reach below zero, as shares of how far it reaches above.
_SHARES_BELOW = tuple(i / 20 for i in range(20, 0, -1))


def weight_statistic(
    weights: Sequence[Tensor], form: Literal["absmax", "mean"] = "absmax", group_size: int | None = None
) -> Tensor:
    """How large each input channel's column is, over all weights that read it.

    weights: matrices (out_i, in). Returns (in,) float32. "absmax": max_i |W_ij| (SmoothQuant). "mean": the mean
    over rows of |W_ij| / rowmax_i, where rowmax_i is the row's largest magnitude, or its group's with a `group_size`
    (AWQ, and LMDeploy's get_weight_scale). Raises SchemeError if the group size does not divide `in`.
    """
    if form == "absmax":
        return torch.stack([torch.maximum(w.amax(0), -w.amin(0)).float() for w in weights]).amax(0)
    total = sum(_relative(w.float().abs(), group_size).sum(0) for w in weights)
    rows = sum(w.shape[0] for w in weights)
    return torch.as_tensor(total) / rows


def _relative(magnitude: Tensor, group_size: int | None) -> Tensor:
    """|W| over the largest of its row or group; 0 in those that are all zero."""
    width = group_size or magnitude.shape[1]
    if magnitude.shape[1] % width:
        raise SchemeError(
            f"group_size must divide in_features; got {group_size} for {magnitude.shape[1]}: choose one that does"
        )
    groups = magnitude.reshape(magnitude.shape[0], -1, width)
    largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / largest).flatten(1)


def smoothing_scale(
    activation: Tensor,
    weight: Tensor,
    alpha: float = 0.5,
    *,
    minimum: float = _MINIMUM,
    normalize: bool = False,
) -> Tensor:
    """The smoothing vector s_j = a_j^α / w_j^(1-α), at least `minimum`; 1 where a channel or its column is zero.

    activation: a (in,), each input channel's absmax over the calibration tokens (absmean for AWQ). weight: w (in,),
    from `weight_statistic`. alpha: 0 leaves the difficulty with the activations, 1 moves all of it to the weights.
    normalize: divide by sqrt(max(s) · min(s)), as AWQ and LMDeploy do. Returns (in,) float32.
    Raises SchemeError if alpha is outside [0, 1].

    >>> smoothing_scale(torch.tensor([2.0, 16, 2, 9]), torch.tensor([2.0, 1, 2, 1])).tolist()
    [1.0, 4.0, 1.0, 3.0]
    """
    if not 0 <= alpha <= 1:
        raise SchemeError(f"alpha must lie in [0, 1]; got {alpha}: 0.5 is the usual choice")
    a, w = activation.float(), weight.float()
    silent = (a == 0) | (w == 0)
    s = (a.pow(alpha) / w.pow(1 - alpha)).clamp(min=minimum).masked_fill(silent, 1.0)
    if normalize:
        s = (s / (s.amax() * s.amin()).sqrt()).masked_fill(silent, 1.0)
    return s


@dataclass(slots=True)
class Smoothing:
    """What smoothing does to a block's weights.

    columns: (in,) multiplies a weight's columns. rows: (out,) divides a producer's rows. migration: (in,) stays with a
    layer to divide its input; its `columns` hold the same vector. folded_into: the producer's name, for the report.
    changed: names of the gains and biases that were divided in place.
    """

    columns: dict[Weight, Tensor] = field(default_factory=dict)
    rows: dict[Weight, Tensor] = field(default_factory=dict)
    migration: dict[Weight, Tensor] = field(default_factory=dict)
    folded_into: dict[Weight, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def apply(self, weight: Weight, matrix: Tensor, kept: bool = True) -> Tensor:
        """The smoothed weight (out, in), float32: diag(1/rows) · W · diag(columns).

        kept: whether a vector that stays with the layer is multiplied in; a layer left in float does without.
        """
        smoothed = matrix.float()
        if weight in self.columns and (kept or weight not in self.migration):
            smoothed = torch.mul(smoothed, self.columns[weight], out=_unless_same(smoothed, matrix))
        if weight in self.rows:
            rows = self.rows[weight].unsqueeze(1)
            smoothed = torch.div(smoothed, rows, out=_unless_same(smoothed, matrix))
        return smoothed

    def apply_in_place(self, weight: Weight, matrix: Tensor) -> None:
        """Smooth a weight (out, in) where it lies, as a layer left in float has it."""
        if matrix.dtype != torch.float32:
            matrix.copy_(self.apply(weight, matrix, kept=False))
            return
        if weight in self.columns and weight not in self.migration:
            matrix.mul_(self.columns[weight])
        if weight in self.rows:
            matrix.div_(self.rows[weight].unsqueeze(1))

    def touches(self, weight: Weight) -> bool:
        """Whether `apply` changes this weight."""
        return weight in self.columns or weight in self.rows

    def keep(self, weight: Weight, s: Tensor) -> None:
        """Leave `s` with the layer."""
        self.columns[weight] = self.migration[weight] = s

    def fold(self, block: nn.Module, fold: Fold, s: Tensor, stored: torch.dtype) -> None:
        """Divide `s` (size,), or its root where the producer is squared, out of the producer, and multiply it into what
        reads it.

        A norm's gain changes here and now, rounded to the dtype that the file holds; the readers get the ratio of
        the old gain to the rounded one, so that they compensate exactly the producer that is stored.
        """
        s = s.masked_fill(~fold.reached.to(s.device), 1.0) ** (1 / fold.degree)
        producer = fold.producer
        if producer.weight is None:
            s = _into_gain(block, producer, s, stored)
        else:
            s = self.rows[producer.weight] = _into_rows(block, producer, s, stored)
        self.changed |= {*producer.gain, *([producer.bias] if producer.bias else [])}
        for reader in fold.readers:
            self.columns[reader.weight] = reader.spread(s)
            self.folded_into[reader.weight] = producer.name


def _unless_same(copy: Tensor, original: Tensor) -> Tensor | None:
    """Where the next result may go: into what is a copy already; fresh pages cost more than the arithmetic."""
    return None if copy is original else copy


def _into_gain(block: nn.Module, producer: Producer, s: Tensor, stored: torch.dtype) -> Tensor:
    gain, *biases = (block.get_parameter(name) for name in producer.gain)
    whole = gain.float() + producer.offset
    folded = (whole / s - producer.offset).to(stored)
    left = folded.float() + producer.offset
    # Where the gain rounds to nothing there is nothing to compensate with: that channel is left alone.
    usable = (left != 0) & (whole != 0)
    with torch.no_grad():
        s = torch.where(usable, whole / left, 1.0)
        gain.copy_(torch.where(usable, folded.to(gain.dtype), gain))
        for bias in biases:
            bias.copy_((bias.float() / s).to(stored))
    return s


def _into_rows(block: nn.Module, producer: Producer, s: Tensor, stored: torch.dtype) -> Tensor:
    if producer.rows is not None:
        inside = torch.zeros_like(s, dtype=torch.bool)
        inside[slice(*producer.rows)] = True
        s = s.masked_fill(~inside, 1.0)
    if producer.bias is not None:
        bias = block.get_parameter(producer.bias)
        with torch.no_grad():
            bias.copy_((bias.float() / s).to(stored))
    return s


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


def turned(
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
