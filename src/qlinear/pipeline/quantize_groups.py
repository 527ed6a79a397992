"""From smoothed weights to codes: the algorithm runs on all weights that read one tensor at a time.

The errors that the report shows are measured here, on a few tokens and rows of each weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ..algorithms.base import Group
from ..algorithms.parts.static_range import choose_static_range
from ..algorithms.rtn import RoundToNearest, round_to_nearest
from ..calibration.stats import InputStats
from ..checkpoint.layouts.base import QuantizedLinear, scale_dtype
from ..errors import DataError
from ..formats.rounding import QuantizedTensor, input_qparams
from ..formats.scheme import Scheme
from ..tracing.trace import Weight
from .block import Block, BlockStats, QuantizedWeight, RoundedInputs
from .options import Options
from .smoothing import Smoothing

# Tokens and rows that an error is measured on, evenly spread. It is a norm: more would cost, and change little.
_TOKENS, _ROWS = 64, 512


def groups_of(
    block: Block, stats: BlockStats, smoothing: Smoothing, weights: Sequence[Weight], options: Options
) -> list[tuple[list[Weight], Group]]:
    """The `weights` that are quantized and saw tokens, by tensor and scheme: the units of the algorithms.

    Matrices are smoothed by `smoothing`; statistics are of the tensor before it is smoothed.
    """
    members: dict[tuple[int, Scheme], list[Weight]] = {}
    for weight in weights:
        scheme, inputs = options.schemes.get(block.full_name(weight)), stats.inputs.get(weight)
        if scheme is not None and inputs is not None and (len(inputs.sample) or scheme.is_static):
            members.setdefault((id(inputs), scheme), []).append(weight)
    return [
        (group, _group(block, smoothing, group, scheme, stats.inputs[group[0]]))
        for (_, scheme), group in members.items()
    ]


def _group(
    block: Block, smoothing: Smoothing, members: Sequence[Weight], scheme: Scheme, inputs: InputStats
) -> Group:
    matrices = {block.full_name(w) + _index(w): smoothing.apply(w, block.matrix(w)) for w in members}
    return Group(
        matrices, scheme, inputs.min, inputs.max, inputs.absmean, inputs.sample.float(), inputs.hessian,
        scale_dtype(scheme, block.stored_dtype(members[0].name)), inputs.unsampled_range,
    )  # fmt: skip


def _index(weight: Weight) -> str:
    return "" if weight.index is None else f"[{weight.index}]"


def smoothed_groups(
    block: Block, stats: BlockStats, smoothing: Smoothing, weights: Sequence[Weight], options: Options
) -> Iterator[tuple[list[Weight], Group]]:
    """`groups_of` with statistics of the smoothed tensor."""
    for members, group in groups_of(block, stats, smoothing, weights, options):
        columns = smoothing.columns.get(members[0])
        yield members, group if columns is None else group.divided(columns)


def quantize_weights(
    block: Block,
    stats: BlockStats,
    smoothing: Smoothing,
    rounded: RoundedInputs,
    weights: Sequence[Weight],
    options: Options,
) -> list[QuantizedWeight]:
    """Codes of the `weights` that are selected, one group after another.

    rounded: how rounding changes inputs, and the range of a static one, where that was measured. Raises DataError for
    a weight that needs the scale of an input which no token reached.
    """
    with_data: dict[Weight, QuantizedWeight] = {}
    for members, group in smoothed_groups(block, stats, smoothing, weights, options):
        ready = _with_inputs(group, rounded, members[0])
        for quantized in _quantize_group(smoothing, members, ready, options):
            with_data[quantized.weight] = quantized
    without = [w for w in weights if block.full_name(w) in options.schemes and w not in with_data]
    return [*with_data.values(), *(_without_data(block, smoothing, w, options) for w in without)]


def _with_inputs(group: Group, rounded: RoundedInputs, first: Weight) -> Group:
    """The group with what was measured of its rounded input, or with the range that is chosen for a static one."""
    measured = rounded.get(first)
    if measured is not None:
        return replace(group, low=measured.low, high=measured.high, rounded_input=measured.halves)
    return choose_static_range(group) if group.scheme.is_static else group


def _without_data(block: Block, smoothing: Smoothing, weight: Weight, options: Options) -> QuantizedWeight:
    """Round a weight to nearest that no token reached."""
    name = block.full_name(weight)
    scheme = options.schemes[name]
    if scheme.is_static:
        raise DataError(
            f"scheme {scheme.name} fixes the input scale of {name}, which no calibration token reached: give more text "
            f"(--samples), or leave it in float with --ignore {name}"
        )
    # An unsmoothed weight is read in its own dtype: a float32 copy would take more memory than the rest of the work.
    matrix = block.matrix(weight)
    matrix = smoothing.apply(weight, matrix) if smoothing.touches(weight) else matrix
    dtype = scale_dtype(scheme, block.stored_dtype(weight.name))
    codes = round_to_nearest(matrix, scheme, name, dtype)
    linear = QuantizedLinear(scheme, codes, dtype, migration_scale=smoothing.migration.get(weight))
    error = relative_error(codes, matrix)
    return QuantizedWeight(weight, linear, error, error)


def _quantize_group(
    smoothing: Smoothing, members: Sequence[Weight], group: Group, options: Options
) -> Iterator[QuantizedWeight]:
    """Codes of the weights of a group, with the error of each on the sample."""
    static_qparams: tuple[Tensor | None, Tensor | None] = (None, None)
    activation = group.scheme.activation
    if activation is not None and not activation.dynamic:
        static_qparams = input_qparams(group.low.amin(), group.high.amax(), activation)
    results = options.algorithm.quantize(group)
    measured = replace(group, sample=group.sample[_evenly(len(group.sample), _TOKENS)])
    x = measured.quantized_sample()
    is_nearest = isinstance(options.algorithm, RoundToNearest)
    for weight, (name, matrix) in zip(members, group.weights.items(), strict=True):
        codes = results[name].weight
        error, rtn_error = _errors(matrix, codes, measured, x, name, is_nearest)
        linear = QuantizedLinear(
            group.scheme, codes, group.scale_dtype, *static_qparams, smoothing.migration.get(weight)
        )
        yield QuantizedWeight(weight, linear, error, rtn_error, results[name].note)


def _errors(
    matrix: Tensor, codes: QuantizedTensor, group: Group, x: Tensor, name: str, is_nearest: bool
) -> tuple[float, float]:
    """Relative errors of a weight's output on the sample, with its codes and rounded to nearest.

    x: the rounded sample (n, in). is_nearest: the codes are those of round to nearest. Without a sample the first error
    is that of the weight.
    """
    rows, some = _some_rows(matrix, codes)
    exact = group.sample @ rows.T
    error = rtn_error = relative(x @ some.dequantize().T, exact)
    if not len(x):
        error = rtn_error = relative_error(codes, matrix)
    if not is_nearest:
        nearest = round_to_nearest(rows, group.scheme, name, group.scale_dtype, codes.global_scale)
        rtn_error = relative(x @ nearest.dequantize().T, exact)
    return error, rtn_error


def _evenly(count: int, most: int) -> slice:
    """About `most` of so many, spread evenly."""
    return slice(None, None, max(1, count // most))


def _some_rows(matrix: Tensor, codes: QuantizedTensor) -> tuple[Tensor, QuantizedTensor]:
    """The rows of a matrix and of its codes that an error is measured on: all, where rows share scales."""
    if codes.format.granularity not in ("channel", "group"):
        return matrix, codes
    rows = _evenly(len(matrix), _ROWS)
    return matrix[rows], codes.rows(rows)


def relative_error(codes: QuantizedTensor, exact: Tensor) -> float:
    """`relative` of the values of codes against a matrix (out, in), on some of its rows."""
    rows, some = _some_rows(exact, codes)
    return relative(some.dequantize(), rows.float())


def relative(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; 0 where exact is 0."""
    norm = float(exact.norm())
    return float((actual - exact).norm()) / norm if norm else 0.0
