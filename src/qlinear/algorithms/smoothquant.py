"""SmoothQuant's smoothing vector, from statistics of the input and the weights (Xiao et al. 2022, eq. 3-4).

    s_j = a_j^α / w_j^(1-α)          a: statistic of the input channels, w: statistic of the weight columns

Dividing the input by s and multiplying the weight's columns by it moves the difficulty of outlier channels from the
activations to the weights.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import SchemeError

_MINIMUM = 1e-5


def weight_statistic(
    weights: Sequence[Tensor], form: Literal["absmax", "mean"] = "absmax", group_size: int | None = None
) -> Tensor:
    """The size of each column, over all weights that read the input.

    weights: matrices (out_i, in). form: "absmax" for max_i |W_ij| (SmoothQuant), "mean" for the mean over rows of
    |W_ij| / rowmax_i (AWQ, and LMDeploy's get_weight_scale), where rowmax_i is the largest magnitude of the row.
    group_size: for "mean", take the largest magnitude of each group of so many columns instead. Returns (in,) float32.
    Raises SchemeError if the group size does not divide `in`.
    """
    if form == "absmax":
        return torch.stack([torch.maximum(w.amax(0), -w.amin(0)).float() for w in weights]).amax(0)
    total = sum(_relative(w.float().abs(), group_size).sum(0) for w in weights)
    rows = sum(w.shape[0] for w in weights)
    return torch.as_tensor(total) / rows


def _relative(magnitude: Tensor, group_size: int | None) -> Tensor:
    """|W| divided by the largest magnitude of its row or group; 0 in rows and groups that are all zero."""
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
    """The smoothing vector s_j = a_j^α / w_j^(1-α); 1 where a channel or its column is all zero.

    activation: a (in,), each input channel's absmax over the calibration tokens (absmean for AWQ). weight: w (in,),
    from `weight_statistic`. alpha: 0 leaves the difficulty with the activations, 1 moves all of it to the weights.
    minimum: the lower bound of s. normalize: divide by sqrt(max(s) · min(s)), as AWQ and LMDeploy do. Returns (in,)
    float32.
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
