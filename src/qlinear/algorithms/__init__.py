"""Algorithms that round weights, one file each: (weight, scheme) -> codes. Nothing downstream rounds again.

rtn      round to nearest: no data, and what all others are measured against
gptq     errors are made up for by the columns still to come
awq      scales that protect what matters, and clipped ranges
alpha    smoothing chosen for each group by its output error
descent  codes and scales of GPTQ, moved on to where the error is least
columns  what these two share
grid     scales of least error, for the others
ranges   how much of its range a static input is given
search   the sweep that alpha and awq share
group    what they work on
"""

from .alpha_search import search_alpha
from .awq import clip, search_scale
from .base import Group
from .gptq import gptq
from .parts.static_range import choose_static_range
from .rtn import round_to_nearest

__all__ = ["Group", "choose_static_range", "clip", "gptq", "round_to_nearest", "search_alpha", "search_scale"]
