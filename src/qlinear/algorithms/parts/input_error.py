"""Weights fitted to the input as it will be rounded, before the weights are rounded themselves.

A layer receives x̂, the rounded x, and should give what W gives of x. W is best for that only where the error e = x - x̂
is uncorrelated with x̂. It is not: a channel whose values are mostly less than half a step is rounded to 0, for example,
and other channels still correlate with it. So the layer gets

    V = W + Δ,  minimise E|x Wᵀ - x̂ Vᵀ|² = E|e Wᵀ - x̂ Δᵀ|²          Δ = W E[e x̂ᵀ] (H + ridge)⁻¹,  H = E[x̂ x̂ᵀ]

GPTAQ (Li et al. 2025) has the same aim, inside GPTQ's column loop. New here are the closed form before that loop, and
the share that guards against overfitting. Part of any fit is chance, more of it with fewer tokens, and tokens of one
text are alike. So only a share a of Δ is applied: the share that would have been best on the second half of the tokens,
for a Δ fitted to the first half.

    a = tr W E₂[e x̂ᵀ] Δ₁ᵀ / tr Δ₁ H₂ Δ₁ᵀ,  between 0 and 1
"""

from collections.abc import Mapping

from torch import Tensor

from ..base import RoundedInput
from .cholesky import Factor, factorize

# Rows of a weight that its share is computed from, evenly spaced.
_ROWS = 512


def fit_to_rounded_input(
    weights: Mapping[str, Tensor], halves: tuple[RoundedInput, RoundedInput], x: RoundedInput, factor: Factor
) -> dict[str, Tensor]:
    """V (out, in) of every weight W (out, in), float32; W itself where a fit to one half does not help on the other.

    x: both halves together. factor: of x.hessian.
    """
    shares = _shares(weights, halves, factor.damping)
    return {
        name: weight if shares[name] <= 0 else factor.solve(weight @ x.drift).mul_(shares[name]).add_(weight)
        for name, weight in weights.items()
    }


def _shares(
    weights: Mapping[str, Tensor], halves: tuple[RoundedInput, RoundedInput], damping: float
) -> dict[str, float]:
    """The share of Δ that each weight gets."""
    first, second = halves
    factor = factorize(first.hessian, damping)
    if factor is None:
        return dict.fromkeys(weights, 0.0)
    some = {name: weight[:: -(-len(weight) // _ROWS)] for name, weight in weights.items()}
    return {name: _share(rows, factor.solve(rows @ first.drift), second) for name, rows in some.items()}


def _share(weight: Tensor, change: Tensor, x: RoundedInput) -> float:
    """The share of a change (out, in) of a weight that is best for x: the least of a parabola, between 0 and 1."""
    slope = float((weight @ x.drift).mul_(change).sum())
    curvature = float((change @ x.hessian).mul_(change).sum())
    return 0.0 if slope <= 0 or curvature <= 0 else min(1.0, slope / curvature)
