"""`--smooth auto`: the migration strength of SmoothQuant, chosen for each group instead of for the model.

Xiao et al. 2022 sweep one alpha by hand per model; which is best differs from layer to layer, and so does whether the
columns of a weight are better measured by their maximum or by their mean (`smooth.weight_statistic`). Both are tried
for every group, and leaving it unsmoothed; see `search` for the objective.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from .base import Group
from .parts.smoothing_search import DEFAULT, OFF, Point, Search, scale_at, search

POINTS = (OFF, *(Point(i / 20, form) for form in ("absmax", "mean") for i in range(21)))


def search_alpha(
    groups: Sequence[Group],
    scales_at: Callable[[Point], Sequence[Tensor]] | None = None,
    points: Sequence[Point] = POINTS,
    ratios: tuple[float, ...] = (1.0,),
    of_others: Callable[[Point], Sequence[Tensor]] | None = None,
) -> Search:
    """The alpha and weight statistic of least output error; never worse on the sample than alpha 0.5 is.

    groups: the weights that share a smoothing vector, by the tensors they read. scales_at: a point to each group's s
    (in,); `search.scale_at` if None. ratios: `grid.RATIOS` where weights will be rounded on a searched grid.
    of_others: see `search`. Raises NumericsError, naming the weight, on NaN or infinity.
    """
    scales_at = scales_at or (lambda p: [scale_at(group, p) for group in groups])
    return search(groups, scales_at, points, DEFAULT, ratios, of_others)
