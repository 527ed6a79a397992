"""Algorithms that turn weights into codes, one file each. Nothing after them rounds again.

To add an algorithm: write one file with a class that follows `base.Algorithm`, and add an instance to `ALGORITHMS`.

    base          Group, the unit that algorithms work on; Codes, what they return; Algorithm, the protocol
    rtn           round to nearest: no data; the reference for all others
    gptq          column by column, each error compensated by the columns that follow
    awq           scales that protect important columns, and clipped ranges
    smoothquant   the smoothing vector from statistics
    alpha_search  `--smooth auto`: the smoothing strength of each group, by its output error
    parts/        shared by several of them: cholesky, clipping, column_grid, coordinate_descent, input_error,
                  smoothing_search, static_range
"""

from ..errors import SchemeError
from .alpha_search import search_alpha
from .awq import Awq, search_scale
from .base import Algorithm, Codes, Group
from .gptq import Gptq
from .parts.static_range import choose_static_range
from .rtn import RoundToNearest, round_to_nearest

ALGORITHMS: tuple[Algorithm, ...] = (RoundToNearest(), Gptq(), Awq())


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name. Raises SchemeError, naming the known ones."""
    known = {algorithm.name: algorithm for algorithm in ALGORITHMS}
    if name not in known:
        *others, last = known
        raise SchemeError(f"algorithm must be {', '.join(others)} or {last}; got {name!r}")
    return known[name]


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Codes",
    "Group",
    "choose_static_range",
    "get_algorithm",
    "round_to_nearest",
    "search_alpha",
    "search_scale",
]
