"""Which smoothing vector each input group of a block gets, and where it goes.

Last group first: dividing a linear's rows by what its readers take changes the largest magnitudes of its columns, and
so what the linear itself needs. The other way round nothing depends on anything.
"""

import torch
from torch import Tensor

from ..algorithms import search_alpha, search_scale
from ..algorithms.grid import ENDS
from ..algorithms.group import Group
from ..algorithms.search import Point, Search
from ..calibrate import absmax_of
from ..smooth import GroupStatistics, group_scale
from ..structure import InputGroup, Weight
from .recipe import Findings, Recipe
from .rounding import grouped


def smooth_block(found: Findings, recipe: Recipe) -> list[list[Weight]]:
    """Smooth every group of a block, folding what can be folded; returns those that nothing can take it for."""
    if recipe.smooth is None:
        return []
    left: list[list[Weight]] = []
    for group in reversed(found.groups):
        holders = _holders(found, group, recipe)
        if group.fold is None and not holders:
            left.append(list(group.weights))
            continue
        s = _vector(found, group, recipe)
        if s is None:
            continue
        if group.fold is not None:
            producer = group.fold.producer
            vector = producer.gain[0] if producer.weight is None else producer.weight.name
            found.smoothing.fold(found.block, group.fold, s, found.stored_dtype(vector))
        else:
            for weight in holders:
                found.smoothing.keep(weight, s)
    return left


def _holders(found: Findings, group: InputGroup, recipe: Recipe) -> list[Weight]:
    """Those of a group's weights that a vector can stay with: experts in a stack have no place for one."""
    return [w for w in group.weights if w.index is None and found.full_name(w) in recipe.holders]


def _vector(found: Findings, group: InputGroup, recipe: Recipe) -> Tensor | None:
    """The vector of a group, from its weights as they are by now; None where the search says to leave it alone."""
    assert recipe.smooth is not None
    matrices = {weight: found.matrix(weight) for weight in group.weights}
    absmax = absmax_of(found.stats, group.weights)
    if not isinstance(recipe.smooth, str):
        return group_scale(group, matrices, absmax, recipe.smooth)
    quantized = [weight for weight in group.weights if found.full_name(weight) in recipe.schemes]
    if not quantized:
        return None
    readers = grouped(found, quantized, recipe)
    if not readers:
        return group_scale(group, matrices, absmax, 0.5)
    absmean = {w: found.stats[w].absmean for w in absmax}
    size = readers[0][1].scheme.weight.group_size
    statistics = GroupStatistics.of(group, matrices, absmax, absmean, size)
    search = _searched(group, readers, statistics, recipe)
    found.searches.update(dict.fromkeys(group.weights, search))
    return None if search.point.form == "off" else statistics.scale(search.point.alpha, search.point.form)


def _searched(
    group: InputGroup, readers: list[tuple[list[Weight], Group]], statistics: GroupStatistics, recipe: Recipe
) -> Search:
    """The best point for all that read the group's tensors."""

    def scales_at(point: Point) -> list[Tensor]:
        if point.form == "off":
            return [torch.ones_like(reader.low) for _, reader in readers]
        s = statistics.scale(point.alpha, point.form)
        return [_as_seen_by(weights[0], group, s) for weights, _ in readers]

    groups = [reader for _, reader in readers]
    if recipe.smooth == "awq":
        return search_scale(groups, scales_at)
    # 4-bit weights are rounded on a grid whose ends may move, whatever the algorithm: see `grid`.
    moves = recipe.algorithm != "rtn" and groups[0].scheme.weight.bits == 4
    return search_alpha(groups, scales_at, ratios=ENDS if moves else (1.0,))


def _as_seen_by(weight: Weight, group: InputGroup, s: Tensor) -> Tensor:
    """A vector over the producer's channels as one over this weight's input (in,)."""
    if group.fold is None:
        return s
    reached = s.masked_fill(~group.fold.reached.to(s.device), 1.0)
    return next(reader for reader in group.fold.readers if reader.weight == weight).spread(reached)
