"""Which smoothing vector each input group of a block gets, and where it goes.

Last group first: dividing a linear's rows by what its readers take changes the largest magnitudes of its columns, and
so what the linear itself needs. The other way round nothing depends on anything.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..algorithms import search_alpha, search_scale
from ..algorithms.base import Group
from ..algorithms.parts.clipping import ENDS
from ..algorithms.parts.smoothing_search import DEFAULT, Point, Search
from ..calibration.collect import absmax_of
from ..calibration.stats import InputStats
from ..tracing.folds import InputGroup
from ..tracing.trace import Weight
from .block_state import Findings, Recipe
from .group_statistics import GroupStatistics, flip_signs, group_scale
from .quantize_groups import grouped


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
    stats = {weight: found.stats[weight] for weight in group.weights if weight in found.stats}
    signs, reach = _reach(found, group, matrices, stats, recipe)
    if not isinstance(recipe.smooth, str):
        return group_scale(group, matrices, reach, recipe.smooth) * signs
    quantized = [weight for weight in group.weights if found.full_name(weight) in recipe.schemes]
    if not quantized:
        return None
    readers = grouped(found, quantized, recipe)
    if not readers:
        return group_scale(group, matrices, reach, DEFAULT.alpha) * signs
    absmean = {weight: each.absmean for weight, each in stats.items()}
    size = readers[0][1].scheme.weight.group_size
    statistics = GroupStatistics.of(group, matrices, reach, absmean, size)
    others = {weight: each.without_sample() for weight, each in stats.items()}
    other_signs, other_reach = _reach(found, group, matrices, others, recipe)
    of_others = statistics.reaching(group, other_reach)
    search = _searched(group, readers, ((statistics, signs), (of_others, other_signs)), recipe)
    found.searches.update(dict.fromkeys(group.weights, search))
    if search.point.form == "off":
        return None
    return statistics.scale(search.point.alpha, search.point.form) * signs


def _reach(
    found: Findings,
    group: InputGroup,
    matrices: Mapping[Weight, Tensor],
    stats: Mapping[Weight, InputStats],
    recipe: Recipe,
) -> tuple[Tensor, dict[Weight, Tensor]]:
    """Signs for a group's vector, and how far its inputs reach (in,): their absmax, unless channels may be turned."""
    absmax = absmax_of(stats, group.weights)
    schemes = [recipe.schemes[name] for w in group.weights if (name := found.full_name(w)) in recipe.schemes]
    is_asymmetric = bool(schemes) and all(scheme.is_asymmetric for scheme in schemes)
    if not (is_asymmetric and absmax and group.fold in found.reversible):
        return torch.ones(()), absmax
    ends = [{weight: getattr(stats[weight], end) for weight in absmax} for end in ("min", "max")]
    return flip_signs(group, matrices, *ends)


def _searched(
    group: InputGroup,
    readers: list[tuple[list[Weight], Group]],
    families: tuple[tuple[GroupStatistics, Tensor], tuple[GroupStatistics, Tensor]],
    recipe: Recipe,
) -> Search:
    """The best point for all that read the group's tensors.

    families: statistics and signs of all tokens, and of those apart from the sample.
    """

    def scales_at(family: tuple[GroupStatistics, Tensor], point: Point) -> list[Tensor]:
        if point.form == "off":
            return [torch.ones_like(reader.low) for _, reader in readers]
        statistics, signs = family
        s = statistics.scale(point.alpha, point.form) * signs
        return [_as_seen_by(weights[0], group, s) for weights, _ in readers]

    groups = [reader for _, reader in readers]
    of_all, of_others = (partial(scales_at, family) for family in families)
    if recipe.smooth == "awq":
        return search_scale(groups, of_all, of_others=of_others)
    # 4-bit weights are rounded on a grid whose ends may move, whatever the algorithm: see `grid`.
    moves = recipe.algorithm != "rtn" and groups[0].scheme.weight.bits == 4
    return search_alpha(groups, of_all, ratios=ENDS if moves else (1.0,), of_others=of_others)


def _as_seen_by(weight: Weight, group: InputGroup, s: Tensor) -> Tensor:
    """A vector over the producer's channels as one over this weight's input (in,)."""
    if group.fold is None:
        return s
    reached = s.masked_fill(~group.fold.reached.to(s.device), 1.0)
    return next(reader for reader in group.fold.readers if reader.weight == weight).spread(reached)
