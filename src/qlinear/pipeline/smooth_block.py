"""Which smoothing vector each input group of a block gets, and where the vector goes.

The last group comes first: dividing a linear's rows by its readers' vector changes the absmax of its columns, and so
the vector that the linear itself needs. In the other order nothing depends on anything.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..algorithms.alpha_search import search_alpha
from ..algorithms.awq import search_scale
from ..algorithms.base import Group
from ..algorithms.parts.clipping import ENDS
from ..algorithms.parts.smoothing_search import DEFAULT, Point, Search
from ..calibration.collect import absmax_of
from ..calibration.stats import InputStats
from ..tracing.folds import InputGroup
from ..tracing.trace import Weight
from .block import Block, BlockStats
from .group_statistics import GroupStatistics, flip_signs, group_scale
from .options import Options
from .quantize_groups import groups_of
from .smoothing import SmoothedBlock


def smooth_block(block: Block, stats: BlockStats, options: Options) -> SmoothedBlock:
    """Choose a vector for every group; fold those that can be folded, and keep the others where the layout can."""
    smoothed = SmoothedBlock()
    if options.smooth is None:
        return smoothed
    for group in reversed(block.groups):
        smoothed = _with_group(smoothed, block, group, stats, options)
    return smoothed


def _with_group(
    smoothed: SmoothedBlock, block: Block, group: InputGroup, stats: BlockStats, options: Options
) -> SmoothedBlock:
    """The block with one more group smoothed."""
    holders = _holders(block, group, options)
    if group.fold is None and not holders:
        return replace(smoothed, unsmoothed=(*smoothed.unsmoothed, group.weights))
    s, search = _vector(smoothed, block, group, stats, options)
    if search is not None:
        smoothed = replace(smoothed, searches={**smoothed.searches, **dict.fromkeys(group.weights, search)})
    if s is None:
        return smoothed
    smoothing = smoothed.smoothing
    if group.fold is not None:
        producer = group.fold.producer
        vector = producer.gain[0] if producer.weight is None else producer.weight.name
        smoothing = smoothing.fold(block.module, group.fold, s, block.stored_dtype(vector))
    else:
        for weight in holders:
            smoothing = smoothing.keep(weight, s)
    return replace(smoothed, smoothing=smoothing)


def _holders(block: Block, group: InputGroup, options: Options) -> list[Weight]:
    """The weights of a group that a vector can stay with; experts in a stack have no place for one."""
    return [w for w in group.weights if w.index is None and block.full_name(w) in options.holders]


def _vector(
    smoothed: SmoothedBlock, block: Block, group: InputGroup, stats: BlockStats, options: Options
) -> tuple[Tensor | None, Search | None]:
    """The vector of a group from its weights as smoothed so far, None to leave it alone; and the search, if any."""
    assert options.smooth is not None
    smoothing = smoothed.smoothing
    matrices = {weight: smoothing.apply(weight, block.matrix(weight)) for weight in group.weights}
    inputs = {weight: stats.inputs[weight] for weight in group.weights if weight in stats.inputs}
    signs, reach = _reach(block, group, matrices, inputs, options)
    if not isinstance(options.smooth, str):
        return group_scale(group, matrices, reach, options.smooth) * signs, None
    quantized = [weight for weight in group.weights if block.full_name(weight) in options.schemes]
    if not quantized:
        return None, None
    readers = groups_of(block, stats, smoothing, quantized, options)
    if not readers:
        return group_scale(group, matrices, reach, DEFAULT.alpha) * signs, None
    absmean = {weight: input_stats.absmean for weight, input_stats in inputs.items()}
    size = readers[0][1].scheme.weight.group_size
    statistics = GroupStatistics.of(group, matrices, reach, absmean, size)
    others = {weight: input_stats.without_sample() for weight, input_stats in inputs.items()}
    other_signs, other_reach = _reach(block, group, matrices, others, options)
    of_others = statistics.reaching(group, other_reach)
    search = _searched(group, readers, ((statistics, signs), (of_others, other_signs)), options)
    if search.point.form == "off":
        return None, search
    return statistics.scale(search.point.alpha, search.point.form) * signs, search


def _reach(
    block: Block,
    group: InputGroup,
    matrices: Mapping[Weight, Tensor],
    inputs: Mapping[Weight, InputStats],
    options: Options,
) -> tuple[Tensor, dict[Weight, Tensor]]:
    """Signs for a group's vector, and the reach (in,) of its inputs: the absmax, unless channels may flip signs."""
    absmax = absmax_of(inputs, group.weights)
    names = [name for weight in group.weights if (name := block.full_name(weight)) in options.schemes]
    is_asymmetric = bool(names) and all(options.schemes[name].is_asymmetric for name in names)
    if not (is_asymmetric and absmax and group.fold in block.reversible):
        return torch.ones(()), absmax
    ends = [{weight: getattr(inputs[weight], end) for weight in absmax} for end in ("min", "max")]
    return flip_signs(group, matrices, *ends)


def _searched(
    group: InputGroup,
    readers: list[tuple[list[Weight], Group]],
    families: tuple[tuple[GroupStatistics, Tensor], tuple[GroupStatistics, Tensor]],
    options: Options,
) -> Search:
    """The best point for all readers of the group's tensors.

    families: statistics and signs of all tokens, and of the tokens apart from the sample.
    """

    def scales_at(family: tuple[GroupStatistics, Tensor], point: Point) -> list[Tensor]:
        if point.form == "off":
            return [torch.ones_like(reader.low) for _, reader in readers]
        statistics, signs = family
        s = statistics.scale(point.alpha, point.form) * signs
        return [_as_seen_by(weights[0], group, s) for weights, _ in readers]

    groups = [reader for _, reader in readers]
    of_all, of_others = (partial(scales_at, family) for family in families)
    if options.smooth == "awq":
        return search_scale(groups, of_all, of_others=of_others)
    # The ends of a 4-bit tile may move where the algorithm chooses its range by error.
    moves = options.algorithm.searches_ranges and groups[0].scheme.weight.bits == 4
    return search_alpha(groups, of_all, ratios=ENDS if moves else (1.0,), of_others=of_others)


def _as_seen_by(weight: Weight, group: InputGroup, s: Tensor) -> Tensor:
    """A vector over the producer's channels as one over this weight's input (in,)."""
    if group.fold is None:
        return s
    reached = s.masked_fill(~group.fold.reached.to(s.device), 1.0)
    return next(reader for reader in group.fold.readers if reader.weight == weight).spread(reached)
