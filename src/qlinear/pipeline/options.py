"""What callers may ask for, and what it means: checked before anything is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..algorithms import get_algorithm
from ..calibration.stats_file import CalibrationStats, load_statistics
from ..checkpoint.layouts.base import Layout
from ..checkpoint.layouts.qlinear import float_config
from ..errors import DataError, SchemeError
from ..formats.scheme import Scheme
from ..runtime.memory import resident
from ..streaming.streamed_model import StreamedModel
from .block_state import Algorithm, Recipe
from .select_layers import Plan, file_names

# How much the work on a block takes at its peak: its weights, what becomes of them, and what passes through them.
_BLOCKS_AT_ONCE = 3


def require_statistics(stats: str | Path, source: StreamedModel, recipe: Recipe) -> CalibrationStats:
    """Statistics from a file. Raises SchemeError for what needs the inputs themselves, DataError for what lacks."""
    if recipe.algorithm != "rtn" or isinstance(recipe.smooth, str) or recipe.propagate:
        raise SchemeError(
            f"algorithm {recipe.algorithm!r} with smooth {recipe.smooth!r} looks at inputs, of which {stats} holds "
            "only statistics: give --calibration instead"
        )
    found = load_statistics(stats, source.checkpoint.fingerprint())
    head = source.head_name
    if head in recipe.schemes and recipe.schemes[head].is_static and head not in found.inputs:
        raise DataError(
            f"scheme {recipe.schemes[head].name} fixes the input scale of {head}, and the statistics hold nothing of "
            f"it: give --calibration instead, or leave it in float with --ignore {head}"
        )
    return found


def quantization_config(
    source: StreamedModel, layout: Layout, plan: Plan, kept: Sequence[str], holders: Sequence[str] = ()
) -> dict[str, Any] | None:
    """config.json's part on quantization, for the linears that are not `kept` in float after all.

    holders: the float linears that hold a smoothing vector, where nothing is quantized.
    """
    left = dict.fromkeys(name for each in kept for name in (each, source.names.source_module(each)))
    used = {scheme for name, scheme in plan.schemes.items() if name not in left}
    if not used:
        return float_config([source.names.source_module(name) for name in holders]) if holders else None
    if len(used) == 1:
        return layout.quantization_config(used.pop(), (*plan.ignored, *left))
    named = {
        file_name: scheme
        for name, scheme in plan.schemes.items()
        if name not in left
        for file_name in file_names(source, name)
    }
    return layout.quantization_config(named, (*plan.ignored, *left))


def require_algorithm(algorithm: Algorithm) -> Algorithm:
    """The algorithm, if it is one. Raises SchemeError."""
    get_algorithm(algorithm)
    return algorithm


def smoothing_of(
    smooth: float | str | None, algorithm: Algorithm, scheme: Scheme | None
) -> float | Literal["auto", "awq"] | None:
    """How a recipe smooths, from what was asked for. Raises SchemeError for what is neither."""
    if smooth is None:
        return "awq" if algorithm == "awq" else 0.5
    if smooth == "off":
        return None
    if smooth == "auto":
        if scheme is None:
            raise SchemeError(
                "smooth 'auto' looks for the least error of a scheme, and scheme 'none' has none: give a number"
            )
        return "auto"
    if isinstance(smooth, str) or not 0 <= smooth <= 1:
        raise SchemeError(f"smooth must be a number in [0, 1], 'auto' or 'off'; got {smooth!r}")
    return float(smooth)


def require_count(keep_worst: int, scheme: Scheme | None) -> int:
    """How many linears to leave in float, if there can be any. Raises SchemeError."""
    if keep_worst < 0 or (keep_worst and scheme is None):
        raise SchemeError(
            f"keep_worst must be 0 or more, and 0 where nothing is quantized; got {keep_worst} with scheme "
            f"{'none' if scheme is None else scheme.name!r}"
        )
    return keep_worst


def require_refinable(
    refine: int, scheme: Scheme | None, propagate: bool | None, has_statistics: bool
) -> int:
    """How often the calibration set is seen to refine a block, if it can be at all. Raises SchemeError."""
    if refine < 0 or (refine and scheme is None):
        raise SchemeError(
            f"refine must be 0 or more, and 0 where nothing is quantized; got {refine} with scheme "
            f"{'none' if scheme is None else scheme.name!r}"
        )
    if refine and propagate is False:
        raise SchemeError(
            "refine tunes a block on what the quantized blocks before it give: leave out --no-propagate"
        )
    if refine and has_statistics:
        raise SchemeError("refine needs the calibration text itself: leave out --stats")
    return refine


def memory_limit(max_memory: int | None, source: StreamedModel) -> int | None:
    """The resident bytes beyond which hidden states are to wait on the disk. Raises SchemeError if too few are allowed.

    What comes after the calibration of a block, its smoothed copies and codes, needs room too.
    """
    least = resident() + _BLOCKS_AT_ONCE * source.block_nbytes
    if max_memory is not None and max_memory < least:
        raise SchemeError(
            f"max_memory must be at least {least / 1e9:.1f}GB, for what is loaded already and {_BLOCKS_AT_ONCE} times "
            f"the largest block; got {max_memory / 1e9:.1f}GB"
        )
    return None if max_memory is None else max_memory - (_BLOCKS_AT_ONCE - 1) * source.block_nbytes
