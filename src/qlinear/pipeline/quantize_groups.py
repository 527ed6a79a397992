"""From smoothed weights to codes: the algorithm of the recipe, for all weights that read one tensor at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..algorithms import choose_static_range, get_algorithm, round_to_nearest
from ..algorithms.base import Group
from ..calibration.stats import InputStats
from ..checkpoint.layouts.base import QuantizedLinear, scale_dtype
from ..errors import DataError
from ..formats.rounding import QuantizedTensor, qparams_from_range
from ..formats.scheme import Scheme, TensorFormat
from ..tracing.trace import Weight
from .block_state import Algorithm, Findings, Recipe

# Tokens and rows that a linear's error is measured on, evenly spread. It is a norm: more would cost, and tell no more.
_TOKENS, _ROWS = 64, 512


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight's codes, and the relative error of its output on the sample: with them, and rounded to nearest."""

    weight: Weight
    held: QuantizedLinear
    error: float
    rtn_error: float
    note: str | None = None


def grouped(found: Findings, weights: Sequence[Weight], recipe: Recipe) -> list[tuple[list[Weight], Group]]:
    """`weights` that are quantized and saw tokens, by the tensor and the scheme: the units of the algorithms.

    Matrices are smoothed as far as smoothing has got; statistics are those of the tensor as the model has it.
    """
    units: dict[tuple[int, Scheme], list[Weight]] = {}
    for weight in weights:
        scheme, stats = recipe.schemes.get(found.full_name(weight)), found.stats.get(weight)
        if scheme is not None and stats is not None and (len(stats.sample) or scheme.is_static):
            units.setdefault((id(stats), scheme), []).append(weight)
    return [
        (members, _group(found, members, scheme, found.stats[members[0]]))
        for (_, scheme), members in units.items()
    ]


def _group(found: Findings, members: Sequence[Weight], scheme: Scheme, stats: InputStats) -> Group:
    return Group(
        {found.full_name(weight) + _slice(weight): found.matrix(weight) for weight in members},
        scheme, stats.min, stats.max, stats.absmean, stats.sample.float(), stats.hessian,
        scale_dtype(scheme, found.stored_dtype(members[0].name)), stats.unsampled_range,
    )  # fmt: skip


def _slice(weight: Weight) -> str:
    return "" if weight.index is None else f"[{weight.index}]"


def smoothed_groups(
    found: Findings, weights: Sequence[Weight], recipe: Recipe
) -> Iterator[tuple[list[Weight], Group]]:
    """`grouped`, with statistics of the smoothed tensor, and the range that is chosen for one that is static."""
    for members, group in grouped(found, weights, recipe):
        first, smoothed = members[0], group
        if first in found.smoothing.columns:
            smoothed = group.divided(found.smoothing.columns[first])
        if group.scheme.is_static:
            if first not in found.ranges:
                chosen = choose_static_range(smoothed)
                found.ranges[first] = chosen.low, chosen.high
            low, high = found.ranges[first]
            smoothed = replace(smoothed, low=low, high=high)
        yield members, replace(smoothed, rounded_input=found.rounded_inputs.get(first))


def round_weights(found: Findings, weights: Sequence[Weight], recipe: Recipe) -> Iterator[Rounded]:
    """Codes of those of `weights` that the recipe quantizes, one unit after another."""
    with_data = set()
    for members, group in smoothed_groups(found, weights, recipe):
        with_data.update(members)
        yield from _round_unit(found, members, group, recipe.algorithm)
    for weight in weights:
        scheme = recipe.schemes.get(found.full_name(weight))
        if scheme is not None and weight not in with_data:
            yield _without_data(found, weight, scheme)


def _without_data(found: Findings, weight: Weight, scheme: Scheme) -> Rounded:
    if scheme.is_static:
        name = found.full_name(weight)
        raise DataError(
            f"scheme {scheme.name} fixes the input scale of {name}, which no calibration token reached: give more text "
            f"(--samples), or leave it in float with --ignore {name}"
        )
    # As it is stored, where nothing smooths it: the float32 copy would take more memory than the rest of the work.
    matrix = found.matrix(weight) if found.smoothing.touches(weight) else weight.of(found.block).detach()
    dtype = scale_dtype(scheme, found.stored_dtype(weight.name))
    quantized = round_to_nearest(matrix, scheme, found.full_name(weight), dtype)
    held = QuantizedLinear(scheme, quantized, dtype, migration_scale=found.smoothing.migration.get(weight))
    error = relative_error(quantized, matrix)
    return Rounded(weight, held, error, error)


def _round_unit(
    found: Findings, members: Sequence[Weight], group: Group, algorithm: Algorithm
) -> Iterator[Rounded]:
    inputs: tuple[Tensor | None, Tensor | None] = (None, None)
    activation = group.scheme.activation
    if activation is not None and not activation.dynamic:
        inputs = input_qparams(group.low, group.high, activation)
    results = get_algorithm(algorithm).quantize(group)
    measured = replace(group, sample=group.sample[_evenly(len(group.sample), _TOKENS)])
    x = measured.quantized_sample()
    for weight, (name, matrix) in zip(members, group.weights.items(), strict=True):
        quantized, note = results[name].weight, results[name].note
        rows, some = _some_rows(matrix, quantized)
        exact = measured.sample @ rows.T
        error = rtn_error = relative(x @ some.dequantize().T, exact)
        if not len(x):
            error = rtn_error = relative_error(quantized, matrix)
        if algorithm != "rtn":
            nearest = round_to_nearest(rows, group.scheme, name, group.scale_dtype)
            rtn_error = relative(x @ nearest.dequantize().T, exact)
        held = QuantizedLinear(
            group.scheme, quantized, group.scale_dtype, *inputs, found.smoothing.migration.get(weight)
        )
        yield Rounded(weight, held, error, rtn_error, note)


def _evenly(count: int, most: int) -> slice:
    """About `most` of so many, spread evenly."""
    return slice(None, None, max(1, count // most))


def _some_rows(matrix: Tensor, quantized: QuantizedTensor) -> tuple[Tensor, QuantizedTensor]:
    """Rows of a matrix and of its codes that an error is measured on: all, where rows share scales."""
    if quantized.format.granularity not in ("channel", "group"):
        return matrix, quantized
    rows = _evenly(len(matrix), _ROWS)
    return matrix[rows], quantized.rows(rows)


def input_qparams(low: Tensor, high: Tensor, activation: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """The one static scale (1,) and zero point (1,) of an input, from each channel's extremes (in,)."""
    return qparams_from_range(low.amin().reshape(1), high.amax().reshape(1), activation)


def relative_error(weight: QuantizedTensor, exact: Tensor) -> float:
    """`relative` of what the codes of a matrix (out, in) stand for, on some of its rows."""
    rows, some = _some_rows(exact, weight)
    return relative(some.dequantize(), rows.float())


def relative(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; 0 where exact is."""
    norm = float(exact.norm())
    return float((actual - exact).norm()) / norm if norm else 0.0
