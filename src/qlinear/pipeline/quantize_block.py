"""One block, one function: from a traced block and its statistics to codes, vectors and a report.

    smooth    choose a vector for every group of weights that share an input      smooth_block
    measure   where the algorithm fits weights to rounded inputs: one more pass   BlockStats.rounded_inputs
    quantize  codes of every selected weight, unit by unit                        quantize_groups
    report    a `Layer` for each linear, and notes for the user

Nothing that is passed in changes. The loop applies the result to the block, and the writer writes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor

from ..algorithms.parts.smoothing_search import Search
from ..formats.rounding import QuantizedTensor
from ..tracing.trace import Weight
from .block import (
    Block,
    BlockResult,
    BlockStats,
    FloatHolder,
    Layer,
    Migration,
    QuantizedWeight,
    Unit,
    joined,
)
from .options import Options
from .quantize_groups import quantize_weights, relative
from .smooth_block import smooth_block
from .smoothing import SmoothedBlock, Smoothing

Work = Callable[[list[Weight]], list[QuantizedWeight]]
# How units are worked on: `map`, or one that shares them over threads or processes; results come in the units' order.
Mapped = Callable[[Work, Sequence[list[Weight]]], Iterator[list[QuantizedWeight]]]


def quantize_block(block: Block, stats: BlockStats, options: Options, mapped: Mapped = map) -> BlockResult:
    """Quantize the selected linears and experts of a block; the block itself stays as it is.

    mapped: how the units are worked on. Raises NumericsError for a weight with NaN or infinity, and DataError for a
    static input that no token reached.
    """
    smoothed = smooth_block(block, stats, options)
    rounded = stats.rounded_inputs(smoothed)
    single, stacks = _singles(block, stats, options), _stacks(block, stats, options)

    def work(unit: list[Weight]) -> list[QuantizedWeight]:
        return quantize_weights(block, stats, smoothed.smoothing, rounded, unit, options)

    results = iter(mapped(work, [*single, *chain.from_iterable(stacks.values())]))
    units = [_unit(block, smoothed, options, members, next(results)) for members in single]
    experts = [
        _stack(block, smoothed, options, name, list(chain.from_iterable(next(results) for _ in members)))
        for name, members in stacks.items()
    ]
    notes = _joined_notes([*_notes(block, stats, smoothed, options), *_notes_of(block, units)])
    changed = _changed(block, smoothed.smoothing, single, options) | smoothed.smoothing.vectors.keys()
    return BlockResult(
        block.name,
        tuple(units),
        tuple(experts),
        smoothed.smoothing,
        frozenset(changed - stacks.keys()),
        notes=notes,
    )


def _singles(block: Block, stats: BlockStats, options: Options) -> list[list[Weight]]:
    """The weights of a block that are in no selected stack, by what an engine may merge."""
    stacks = block.stacks(options.schemes)
    return stats.merge_groups([weight for weight in block.weights() if weight.name not in stacks])


def _stacks(block: Block, stats: BlockStats, options: Options) -> dict[str, list[list[Weight]]]:
    """All matrices of each selected stack (experts, out, in), whether tokens reached them or not."""
    seen = {(weight.name, weight.index): weight for weight in block.weights()}
    return {
        name: stats.merge_groups(
            [
                seen.get((name, i), Weight(name, False, i))
                for i in range(len(block.module.get_parameter(name)))
            ]
        )
        for name in block.stacks(options.schemes)
    }


def _unit(
    block: Block,
    smoothed: SmoothedBlock,
    options: Options,
    members: Sequence[Weight],
    quantized: Sequence[QuantizedWeight],
) -> Unit:
    """A unit of linears with its reports, and with the linears that stay in float and can hold a vector."""
    done = {result.weight for result in quantized}
    holders = [w for w in members if w not in done and block.full_name(w) in options.holders]
    return Unit(
        tuple(quantized),
        tuple(_report(block, smoothed, options, result) for result in quantized),
        tuple(_holder(block, smoothed, options, weight) for weight in holders),
    )


def _stack(
    block: Block, smoothed: SmoothedBlock, options: Options, name: str, members: Sequence[QuantizedWeight]
) -> Unit:
    """The experts of a stack as one weight, with the means of their errors."""
    experts = sorted(members, key=lambda expert: expert.weight.index or 0)
    codes = QuantizedTensor.stack([expert.linear.weight for expert in experts])
    error, rtn_error = (
        sum(values) / len(experts) for values in ([e.error for e in experts], [e.rtn_error for e in experts])
    )
    whole = QuantizedWeight(Weight(name), replace(experts[0].linear, weight=codes), error, rtn_error)
    report = _report(block, smoothed, options, replace(whole, weight=experts[0].weight))
    return Unit((whole,), (replace(report, name=joined(block.name, name)),))


def _changed(
    block: Block, smoothing: Smoothing, single: Iterable[Sequence[Weight]], options: Options
) -> set[str]:
    """The names of the weights that stay in float, hold no vector, and are changed by smoothing."""
    floats = [
        w
        for w in chain.from_iterable(single)
        if block.full_name(w) not in {*options.schemes, *options.holders}
    ]
    return {weight.name for weight in floats if smoothing.touches(weight)}


def _report(block: Block, smoothed: SmoothedBlock, options: Options, result: QuantizedWeight) -> Layer:
    scheme = result.linear.scheme.name
    return _layer(block, smoothed, options, result.weight, scheme, result.error, result.rtn_error)


def _layer(
    block: Block,
    smoothed: SmoothedBlock,
    options: Options,
    weight: Weight,
    scheme: str | None,
    error: float,
    rtn_error: float,
) -> Layer:
    """The report of one linear; its share of the squared errors is known at the end of the job."""
    smoothing, leader = smoothed.smoothing, block.leader(weight)
    producer, search = smoothing.folded_into.get(weight), smoothed.searches.get(weight)
    where: Migration = "kept" if weight in smoothing.migration else "folded" if producer else "none"
    alpha = search.point.alpha if search and where != "none" else None
    if search is None and where != "none" and not isinstance(options.smooth, str):
        alpha = options.smooth
    return Layer(
        block.full_name(weight), scheme, error, rtn_error, 0.0, where, producer and joined(block.name, producer),
        joined(block.name, leader.module) if leader else None, alpha, _curve(search),
    )  # fmt: skip


def _curve(search: Search | None) -> tuple[tuple[str, float, float], ...]:
    return tuple((point.form, point.alpha, error) for point, error in search.curve) if search else ()


def _holder(block: Block, smoothed: SmoothedBlock, options: Options, weight: Weight) -> FloatHolder:
    """A float linear, smoothed, and the vector that it keeps, if any."""
    smoothing, matrix = smoothed.smoothing, block.matrix(weight)
    vector = smoothing.migration.get(weight)
    exact = _as_computed(smoothing, weight, matrix)
    if vector is not None:
        exact = exact * vector
    stored = exact.to(block.stored_dtype(weight.name))
    error = relative(stored.float(), exact)
    layer = _layer(block, smoothed, options, weight, None, error, error)
    return FloatHolder(block.full_name(weight), stored if smoothing.touches(weight) else None, vector, layer)


def _as_computed(smoothing: Smoothing, weight: Weight, matrix: Tensor) -> Tensor:
    """The smoothed weight without the vector that stays with it, float32, as the block's dtype has it."""
    return smoothing.apply(weight, matrix, kept=False).to(matrix.dtype).float()


def _notes(block: Block, stats: BlockStats, smoothed: SmoothedBlock, options: Options) -> Iterator[str]:
    """What a user should know of groups that are not smoothed and of weights that calibration did not see."""
    for group in smoothed.unsmoothed:
        names = ", ".join(joined(block.name, weight.module) for weight in group)
        yield f"{names}: nothing can take the smoothing, left unsmoothed"
    if block.unread:
        names = ", ".join(joined(block.name, name) for name in block.unread)
        yield f"{names}: multiply otherwise than linear layers do, left as they are"
    selected = [weight for weight in block.weights() if block.full_name(weight) in options.schemes]
    idle = [weight for weight in selected if stats.is_measured and weight not in stats.inputs]
    if idle:
        names = ", ".join(block.full_name(w) + ("" if w.index is None else f"[{w.index}]") for w in idle)
        yield f"{names}: no calibration token reached them, rounded by what their weights are alone"


def _notes_of(block: Block, units: Iterable[Unit]) -> Iterator[str]:
    """The algorithm's own notes, each with the linear's name."""
    for result in chain.from_iterable(unit.quantized for unit in units):
        if result.note:
            yield f"{block.full_name(result.weight)}: {result.note}"


def _joined_notes(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes with one for all linears of which the same is said; a note is `names: words`."""
    names_by_words: dict[str, list[str]] = {}
    for note in notes:
        names, _, words = note.partition(": ")
        names_by_words.setdefault(words, []).append(names)
    return tuple(f"{', '.join(names)}: {words}" for words, names in names_by_words.items())
