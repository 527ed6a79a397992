"""`--smooth auto`: the migration strength of SmoothQuant, chosen for each group instead of once for the model.

Xiao et al. 2022 sweep one α by hand per model. The best α differs between layers, and so does the better statistic of
the weight columns, maximum or mean (`smoothquant.weight_statistic`). So both statistics are tried for every group, at
21 strengths each, and no smoothing as well. `parts.smoothing_search` defines the error that decides.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Group
from .parts.smoothing_search import DEFAULT, OFF, Point, Search, search

POINTS = (OFF, *(Point(i / 20, form) for form in ("absmax", "mean") for i in range(21)))


def search_alpha(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]],
    points: Sequence[Point] = POINTS,
    ratios: tuple[float, ...] = (1.0,),
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """The α and weight statistic of least output error; on the sample never worse than α 0.5.

    groups: the weights that share a smoothing vector, by the tensors they read. scales_at: maps a point to the vector s
    (in,) of each group. ratios: the ranges that tiles may choose from, `clipping.ENDS` where the weights' ranges will
    be searched. of_others: see `search`. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    return search(groups, scales_at, points, DEFAULT, ratios, of_others)
