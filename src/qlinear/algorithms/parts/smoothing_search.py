"""The search for a smoothing vector, by its output error under the scheme that will run.

    error(s)² = Σ_W |x Wᵀ - A(x / s) Q(W · diag(s))ᵀ|² / Σ_W |x Wᵀ|²

Q and A round weights and activations as the scheme does. The sum is over all weights that share s, on a fixed sample of
tokens. s comes from a family with one parameter (`Point`), so the search tries a grid of points:

1. A sweep over all points, on evenly spaced rows and tokens: a few hundred of each tell the points apart.
2. The winner against the default, on all rows and tokens of the sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...formats.finite import require_finite
from ...formats.rounding import dequantize, quantize
from ...formats.scheme import TensorFormat
from ..base import Group
from .clipping import least_error_qparams

Form = Literal["off", "absmax", "mean", "awq"]

# Rows of each weight, and tokens, in the sweep.
_ROWS, _TOKENS = 512, 256


@dataclass(frozen=True, slots=True)
class Point:
    """One smoothing vector of the family, s = a^α / w^(1-α).

    form: the statistics a of the input and w of the weights. "absmax": absmax of both (SmoothQuant). "mean": absmax of
    the input, mean relative magnitude of the weights. "awq": mean magnitude of the input, mean relative magnitude of
    the weights, normalised. "off": s = 1.
    """

    alpha: float = 0.5
    form: Form = "absmax"


DEFAULT, OFF = Point(), Point(0.0, "off")


@dataclass(frozen=True, slots=True)
class Search:
    """The result of a search.

    point: the winner. error, default_error: relative output error of the winner and of the default, on all rows and
    tokens. curve: every point with its error in the sweep.
    """

    point: Point
    error: float
    default_error: float
    curve: tuple[tuple[Point, float], ...]


def search(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]],
    points: Sequence[Point],
    default: Point,
    ratios: tuple[float, ...] = (1.0,),
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """The point of least output error; the default unless another is better on all rows.

    The sweep uses the ranges of tokens outside the sample, because in service the layer meets tokens that the ranges do
    not come from.

    groups: all that share one vector; usually one, but each expert reads tokens of its own. scales_at: maps a point to
    the vector s (in,) of each group, in the order of the group's input channels. default: tried besides `points`.
    ratios: the ranges that a tile of a weight may choose from (`clipping`), (1.0,) where weights will be rounded to
    nearest. of_others: as scales_at, from the ranges of the other tokens; scales_at if None.
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
    """The error at the top of the file, as a function of s.

    exact: x Wᵀ (n, out) of every weight, by group. norm: Σ_W |x Wᵀ|².
    """

    groups: tuple[Group, ...]
    exact: tuple[tuple[Tensor, ...], ...]
    norm: float
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, groups: Sequence[Group], ratios: tuple[float, ...] = (1.0,)) -> "Objective":
        """Compute the exact outputs, once for all vectors."""
        exact = tuple(tuple(g.sample @ w.T for w in g.weights.values()) for g in groups)
        norm = sum(float(y.square().sum()) for outputs in exact for y in outputs)
        return cls(tuple(groups), exact, norm, ratios)

    def error(self, scales: Sequence[Tensor]) -> float:
        """The relative error with group i smoothed by scales[i] (in,); 0 where all outputs are 0."""
        total = 0.0
        for group, exact, s in zip(self.groups, self.exact, scales, strict=True):
            smoothed = group.smoothed(s)
            x, importance = smoothed.quantized_sample(), smoothed.sample.square().mean(0)
            stored = smoothed.scale_dtype, smoothed.global_scale
            for (name, weight), y in zip(smoothed.weights.items(), exact, strict=True):
                rounded = self._rounded(name, weight, importance, group.scheme.weight, stored)
                total += float(torch.addmm(y, x, rounded.T, beta=-1).square_().sum())
        return float((total / self.norm) ** 0.5) if self.norm else 0.0

    def _rounded(
        self,
        name: str,
        weight: Tensor,
        importance: Tensor,
        fmt: TensorFormat,
        stored: tuple[torch.dtype, Tensor | None],
    ) -> Tensor:
        require_finite(weight, name)
        qparams = least_error_qparams(weight, fmt, importance, *stored, ratios=self.ratios)
        return dequantize(quantize(weight, *qparams, fmt), *qparams, fmt)


def _thinned(group: Group) -> Group:
    """The group of the sweep: at most `_TOKENS` tokens, and `_ROWS` rows of each weight unless rows share scales."""
    group = replace(group.without_sample(), sample=group.sample[:: max(1, -(-len(group.sample) // _TOKENS))])
    if group.scheme.weight.granularity in ("tensor", "block"):
        return group
    thin = {name: w[:: -(-w.shape[0] // _ROWS)].contiguous() for name, w in group.weights.items()}
    # Dropped, because `smoothed` would divide it for nothing.
    return replace(group, weights=thin, hessian=None)
