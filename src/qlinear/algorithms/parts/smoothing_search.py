"""Choosing a smoothing vector by what it does to the output, under the very scheme that will run.

    error(s)² = Σ_W |x Wᵀ - A(x / s) Q(W · diag(s))ᵀ|² / Σ_W |x Wᵀ|²

Q and A round the weights and the activations as they will be rounded; the sum is over all weights that share s, on a
fixed sample of tokens. s comes from a family with one parameter (`Point`), so a grid of points is all that is tried.
The sweep looks at an even choice of each weight's rows and of the tokens: a few hundred tell the points apart. The
winner and the default are then compared on all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...formats.rounding import dequantize, quantize, require_finite
from ..base import Group
from ..smoothquant import smoothing_scale, weight_statistic
from .clipping import least_error_qparams

Form = Literal["off", "absmax", "mean", "awq"]

# Rows of each weight, and tokens, that the sweep looks at.
_ROWS, _TOKENS = 512, 256


@dataclass(frozen=True, slots=True)
class Point:
    """One smoothing vector of the family, s = a^α / w^(1-α).

    form: which statistics a of the input and w of the weights. "absmax": absmax of both (SmoothQuant). "mean": absmax,
    and the weights' mean relative magnitude. "awq": the input's mean magnitude and that one, normalised. "off": s = 1.
    """

    alpha: float = 0.5
    form: Form = "absmax"


DEFAULT, OFF = Point(), Point(0.0, "off")


@dataclass(frozen=True, slots=True)
class Search:
    """What was found: a point, its relative output error and the default's, and the error of every point tried.

    error and default_error are over all rows; the curve's are over the rows of the sweep.
    """

    point: Point
    error: float
    default_error: float
    curve: tuple[tuple[Point, float], ...]


def scale_at(group: Group, point: Point) -> Tensor:
    """The smoothing vector (in,) of a group that stands alone, at a point of the family."""
    weights, size = list(group.weights.values()), group.scheme.weight.group_size
    if point.form == "off":
        return torch.ones_like(group.low)
    if point.form == "absmax":
        return smoothing_scale(group.absmax, weight_statistic(weights), point.alpha)
    relative = weight_statistic(weights, "mean", size)
    if point.form == "mean":
        return smoothing_scale(group.absmax, relative, point.alpha)
    return smoothing_scale(group.absmean, relative, point.alpha, normalize=True)


def search(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]],
    points: Sequence[Point],
    default: Point,
    ratios: tuple[float, ...] = (1.0,),
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """The point of least output error; the default unless another is better on all rows.

    The sweep knows the ranges of other tokens than the sample: what is served will meet tokens that it was not made of.

    groups: all that share one vector; usually one, but experts read their own tokens each. scales_at: a point to each
    group's own s (in,), the same vector as its input channels see it. default: tried besides `points`. ratios: the
    ranges that a tile of a weight may choose from (`grid`): (1.0,) where weights will be rounded to nearest. of_others:
    as scales_at, of the other tokens' ranges; the same if None.
    """
    thin, thin_scales_at = Objective.of([_thinned(group) for group in groups], ratios), of_others or scales_at
    curve = tuple((point, thin.error(thin_scales_at(point))) for point in dict.fromkeys([default, *points]))
    best = min(curve, key=lambda entry: entry[1])[0]
    whole = Objective.of(groups, ratios)
    default_error = whole.error(scales_at(default))
    error = default_error if best == default else whole.error(scales_at(best))
    if not error < default_error:
        best, error = default, default_error
    return Search(best, error, default_error, curve)


@dataclass(frozen=True, slots=True)
class Objective:
    """The error at the top, as a function of s. exact: x Wᵀ (n, out) of every weight, group after group."""

    groups: tuple[Group, ...]
    exact: tuple[tuple[Tensor, ...], ...]
    norm: float
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, groups: Sequence[Group], ratios: tuple[float, ...] = (1.0,)) -> "Objective":
        """Multiply the samples by the weights, once."""
        exact = tuple(tuple(g.sample @ w.T for w in g.weights.values()) for g in groups)
        norm = sum(float(y.square().sum()) for outputs in exact for y in outputs)
        return cls(tuple(groups), exact, norm, ratios)

    def error(self, scales: Sequence[Tensor]) -> float:
        """The relative error when group i is smoothed by scales[i] (in,); 0 where all outputs are."""
        total = 0.0
        for group, exact, s in zip(self.groups, self.exact, scales, strict=True):
            smoothed = group.smoothed(s)
            x, importance = smoothed.quantized_sample(), smoothed.sample.square().mean(0)
            for (name, weight), y in zip(smoothed.weights.items(), exact, strict=True):
                rounded = self._rounded(name, weight, importance, group)
                total += float(torch.addmm(y, x, rounded.T, beta=-1).square_().sum())
        return float((total / self.norm) ** 0.5) if self.norm else 0.0

    def _rounded(self, name: str, weight: Tensor, importance: Tensor, group: Group) -> Tensor:
        require_finite(weight, name)
        fmt = group.scheme.weight
        qparams = least_error_qparams(weight, fmt, importance, group.scale_dtype, self.ratios)
        return dequantize(quantize(weight, *qparams, fmt), *qparams, fmt)


def _thinned(group: Group) -> Group:
    """As the sweep has the group: at most `_TOKENS` tokens and `_ROWS` rows of each weight, where rows stand alone."""
    group = replace(group.without_sample(), sample=group.sample[:: max(1, -(-len(group.sample) // _TOKENS))])
    if group.scheme.weight.granularity in ("tensor", "block"):
        return group
    thin = {name: w[:: -(-w.shape[0] // _ROWS)].contiguous() for name, w in group.weights.items()}
    # `smoothed` would carry the second moments along for nothing.
    return replace(group, weights=thin, hessian=None)
