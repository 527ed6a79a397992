"""What was asked for, as one frozen value: checked here before any work, and complete enough to describe the result.

Options.asked   from the flat arguments of `qlinear.quantize`, each checked on its own
for_model       with the scheme of every linear of one model
settings        what the journal, the model card and `qlinear.json` say of it
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..algorithms import get_algorithm
from ..algorithms.base import Algorithm
from ..calibration.stats_file import CalibrationStats, load_statistics
from ..checkpoint.layouts import MigrationPolicy, get_layout, supported_migration
from ..checkpoint.layouts.base import Layout
from ..checkpoint.layouts.qlinear import float_config
from ..errors import DataError, OutputError, SchemeError
from ..formats.scheme import Scheme, get_scheme
from ..runtime.memory import resident
from ..streaming.streamed_model import StreamedModel
from ..tracing.trace import Weight
from .block import Block
from .select_layers import Plan, file_names

# The memory that work on a block takes at its peak, in blocks: its weights, their codes, and the tokens in it.
_BLOCKS_AT_ONCE = 3
# The widest weight that is fitted to its rounded input. The fit needs six square matrices of that width, and a job is
# to fit a machine that holds little more than a block.
_WIDEST = 1 << 14

Smooth = float | Literal["auto", "awq"] | None


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a job.

    scheme: the default scheme, None to smooth alone. algorithm: the object that chooses codes. smooth: alpha, "auto"
    to search it for each group, "awq" for AWQ's own search, None for no smoothing. migration_scale: which vectors stay
    with their layers. propagate: whether blocks are calibrated with the output of the quantized blocks before them.
    scheme_for: other schemes by pattern. keep_worst: how many linears to leave in float. refine: passes of the
    calibration set that tune the scales of a block. stats: name of a file of statistics. samples, seq_len: of the
    calibration set. dtype: of the computation. schemes: the scheme of every selected linear, by name. holders: the
    linears that can keep a vector.
    """

    scheme: Scheme | None
    algorithm: Algorithm
    format: str = "compressed-tensors"
    smooth: Smooth = 0.5
    migration_scale: MigrationPolicy = "never"
    propagate: bool = False
    scheme_for: Mapping[str, Scheme] = field(default_factory=dict)
    keep_worst: int = 0
    refine: int = 0
    stats: str | None = None
    ignore: tuple[str, ...] | None = None
    samples: int = 0
    seq_len: int = 0
    seed: int = 0
    dtype: str = "float32"
    max_shard_size: int = 5 * 10**9
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    holders: frozenset[str] = frozenset()

    @classmethod
    def asked(
        cls,
        *,
        scheme: str | Scheme,
        algorithm: str,
        format: str,
        smooth: float | str | None,
        migration_scale: MigrationPolicy,
        propagate: bool | None,
        scheme_for: Mapping[str, str | Scheme] | None,
        keep_worst: int,
        refine: int,
        stats: str | Path | None,
        ignore: Sequence[str] | None,
        samples: int,
        seq_len: int,
        seed: int,
        max_shard_size: int,
    ) -> "Options":
        """The options that the arguments of `qlinear.quantize` ask for. Raises SchemeError or OutputError."""
        wanted, chosen = None if scheme == "none" else get_scheme(scheme), get_algorithm(algorithm)
        if max_shard_size < 1:
            raise OutputError(f"max_shard_size must be at least 1 byte; got {max_shard_size}")
        get_layout(format)
        _require_count("keep_worst", keep_worst, wanted)
        _require_refinable(refine, wanted, propagate, stats is not None)
        return cls(
            scheme=wanted, algorithm=chosen, format=format, smooth=_smoothing(smooth, chosen, wanted),
            migration_scale=supported_migration(migration_scale, format, wanted),
            propagate=chosen.propagates or refine > 0 if propagate is None else propagate,
            scheme_for={pattern: get_scheme(other) for pattern, other in (scheme_for or {}).items()},
            keep_worst=keep_worst, refine=refine, stats=None if stats is None else Path(stats).name,
            ignore=None if ignore is None else tuple(ignore), samples=samples, seq_len=seq_len, seed=seed,
            max_shard_size=max_shard_size,
        )  # fmt: skip

    def for_model(self, plan: Plan) -> "Options":
        """With the linears of a model that were selected."""
        holders = frozenset() if self.migration_scale == "never" else plan.holders
        return replace(self, schemes=plan.schemes, holders=holders)

    @property
    def layout(self) -> Layout:
        """The on-disk layout of the result."""
        return get_layout(self.format)

    @property
    def needs_data(self) -> bool:
        """Whether calibration text passes through the model."""
        asked = [*self.scheme_for.values(), *([self.scheme] if self.scheme else [])]
        needs_inputs = any(scheme.needs_inputs for scheme in (self.schemes.values() or asked))
        uses_inputs = self.smooth is not None or bool(self.algorithm.needs) or self.algorithm.propagates
        return uses_inputs or needs_inputs or self.keep_worst > 0 or self.refine > 0

    @property
    def may_flip_signs(self) -> bool:
        """Whether smoothing may flip the signs of channels; see `group_statistics.flip_signs`."""
        return self.smooth is not None and any(scheme.is_asymmetric for scheme in self.schemes.values())

    def fits(self, block: Block, weight: Weight) -> bool:
        """Whether a weight is fitted to its rounded input; see `rounded_inputs`.

        Experts in a stack are not, since each sees few of the tokens, nor is a weight that is too wide.
        """
        scheme = self.schemes.get(block.full_name(weight))
        is_rounded = scheme is not None and scheme.activation is not None
        can_fit = "rounded_input" in self.algorithm.needs and self.propagate and weight.index is None
        return is_rounded and can_fit and block.matrix(weight).shape[1] <= _WIDEST

    def needs_hessian(self, block: Block, weight: Weight) -> bool:
        """Whether the algorithm needs the hessian of a weight's input before rounding."""
        is_selected = block.full_name(weight) in self.schemes
        return is_selected and "hessian" in self.algorithm.needs and not self.fits(block, weight)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        return {
            "scheme": "none" if self.scheme is None else self.scheme.name, "format": self.format,
            "algorithm": self.algorithm.name, "smooth": "off" if self.smooth is None else self.smooth,
            "migration_scale": self.migration_scale, "propagate": self.propagate,
            "scheme_for": {pattern: scheme.name for pattern, scheme in self.scheme_for.items()},
            "keep_worst": self.keep_worst, "refine": self.refine, "stats": self.stats,
            "ignore": None if self.ignore is None else list(self.ignore),
            "samples": self.samples, "seq_len": self.seq_len, "seed": self.seed, "dtype": self.dtype,
            "max_shard_size": self.max_shard_size,
        }  # fmt: skip


def _smoothing(smooth: float | str | None, algorithm: Algorithm, scheme: Scheme | None) -> Smooth:
    """How groups are smoothed. Raises SchemeError."""
    if smooth is None:
        return algorithm.default_smooth
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


def _require_count(option: str, count: int, scheme: Scheme | None) -> None:
    """Raise SchemeError unless a count is 0, or positive where something is quantized."""
    if count < 0 or (count and scheme is None):
        raise SchemeError(
            f"{option} must be 0 or more, and 0 where nothing is quantized; got {count} with scheme "
            f"{'none' if scheme is None else scheme.name!r}"
        )


def _require_refinable(
    refine: int, scheme: Scheme | None, propagate: bool | None, has_statistics: bool
) -> None:
    """Raise SchemeError unless blocks can be refined so often."""
    _require_count("refine", refine, scheme)
    if refine and propagate is False:
        raise SchemeError(
            "refine tunes a block on what the quantized blocks before it give: leave out --no-propagate"
        )
    if refine and has_statistics:
        raise SchemeError("refine needs the calibration text itself: leave out --stats")


def require_statistics(stats: str | Path, source: StreamedModel, options: Options) -> CalibrationStats:
    """Statistics from a file. Raises SchemeError if the job needs the inputs, DataError for a missing one."""
    if options.algorithm.needs or isinstance(options.smooth, str) or options.propagate:
        raise SchemeError(
            f"algorithm {options.algorithm.name!r} with smooth {options.smooth!r} looks at inputs, of which {stats} "
            "holds only statistics: give --calibration instead"
        )
    statistics = load_statistics(stats, source.checkpoint.fingerprint())
    head = source.head_name
    if head in options.schemes and options.schemes[head].is_static and head not in statistics.inputs:
        raise DataError(
            f"scheme {options.schemes[head].name} fixes the input scale of {head}, and the statistics hold nothing of "
            f"it: give --calibration instead, or leave it in float with --ignore {head}"
        )
    return statistics


def quantization_config(
    source: StreamedModel, layout: Layout, plan: Plan, kept: Iterable[str] = (), holders: Iterable[str] = ()
) -> dict[str, Any] | None:
    """config.json's part on quantization. kept: selected linears that stay in float after all.

    holders: the float linears that hold a smoothing vector, where nothing is quantized.
    """
    floats = dict.fromkeys(both for name in kept for both in (name, source.names.source_module(name)))
    used = {scheme for name, scheme in plan.schemes.items() if name not in floats}
    if not used:
        names = [source.names.source_module(name) for name in holders]
        return float_config(names) if names else None
    if len(used) == 1:
        return layout.quantization_config(used.pop(), (*plan.ignored, *floats))
    named = {
        file_name: scheme
        for name, scheme in plan.schemes.items()
        if name not in floats
        for file_name in file_names(source, name)
    }
    return layout.quantization_config(named, (*plan.ignored, *floats))


def memory_limit(max_memory: int | None, source: StreamedModel) -> int | None:
    """The resident bytes beyond which hidden states wait on the disk. Raises SchemeError if too few are allowed.

    Work on a block after its calibration, its smoothed copies and codes, needs room too.
    """
    least = resident() + _BLOCKS_AT_ONCE * source.block_nbytes
    if max_memory is not None and max_memory < least:
        raise SchemeError(
            f"max_memory must be at least {least / 1e9:.1f}GB, for what is loaded already and {_BLOCKS_AT_ONCE} times "
            f"the largest block; got {max_memory / 1e9:.1f}GB"
        )
    return None if max_memory is None else max_memory - (_BLOCKS_AT_ONCE - 1) * source.block_nbytes
