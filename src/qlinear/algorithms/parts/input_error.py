"""Weights fitted to the input as it will be rounded, before they are rounded themselves.

A layer is served x̂, what rounding makes of x, and is asked for what W gives of x. W is best for that only where what is
lost, e = x - x̂, has nothing to do with what is left. A channel whose values are mostly less than half a step, say,
loses what others still tell of. So the layer gets

    V = W + Δ,  minimise E|x Wᵀ - x̂ Vᵀ|² = E|e Wᵀ - x̂ Δᵀ|²          Δ = W E[e x̂ᵀ] (H + ridge)⁻¹,  H = E[x̂ x̂ᵀ]

Some of what a fit finds is chance, the more the fewer the tokens; and tokens of one text are alike. So only a share a
of Δ is taken, the one that would have been best on one half of the tokens for a Δ that was fitted to the other:

    a = tr W E₂[e x̂ᵀ] Δ₁ᵀ / tr Δ₁ H₂ Δ₁ᵀ,  between 0 and 1
"""

from collections.abc import Mapping

from torch import Tensor

from ..base import RoundedInput
from .cholesky import Factor, factorize

# Rows of a weight that its share is found on, evenly spread.
_ROWS = 512


def fit_to_rounded_input(
    weights: Mapping[str, Tensor], halves: tuple[RoundedInput, RoundedInput], x: RoundedInput, factor: Factor
) -> dict[str, Tensor]:
    """V (out, in) of every weight W (out, in), float32; W itself where one half tells nothing of the other.

    x: of both halves. factor: of x.moment.
    """
    shares = _shares(weights, halves, factor.damping)
    return {
        name: weight if shares[name] <= 0 else factor.solve(weight @ x.drift).mul_(shares[name]).add_(weight)
        for name, weight in weights.items()
    }


def _shares(
    weights: Mapping[str, Tensor], halves: tuple[RoundedInput, RoundedInput], damping: float
) -> dict[str, float]:
    """How much is taken of what fits each weight."""
    first, second = halves
    factor = factorize(first.hessian, damping)
    if factor is None:
        return dict.fromkeys(weights, 0.0)
    some = {name: weight[:: -(-len(weight) // _ROWS)] for name, weight in weights.items()}
    return {name: _share(rows, factor.solve(rows @ first.drift), second) for name, rows in some.items()}


def _share(weight: Tensor, change: Tensor, x: RoundedInput) -> float:
    """How much of a change (out, in) of a weight is best for x: the least of a parabola, between 0 and 1."""
    slope = float((weight @ x.drift).mul_(change).sum())
    curvature = float((change @ x.hessian).mul_(change).sum())
    return 0.0 if slope <= 0 or curvature <= 0 else min(1.0, slope / curvature)
