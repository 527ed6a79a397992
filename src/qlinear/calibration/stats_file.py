"""Files of statistics of a model's inputs: calibrate once, quantize as often as needed.

The suffix selects one of two formats:

    .safetensors   `NAME.absmax`, `.absmean`, `.min`, `.max` and `.mean`, each (in,) float32, stored once for weights
                   that read one tensor; the metadata holds the names of these weights, the number of tokens, and the
                   fingerprint of the model
    .pth           LMDeploy's `inputs_stats.pth`: {absmax, absmean, max, mean, min} -> name -> (in,)

A weight is named by its module. A parameter that is not called `weight` is named by itself, and a matrix in a stack of
experts by the stack and its index.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checkpoint.output_dir import write_atomically
from ..checkpoint.torch_bin import UNREADABLE
from ..errors import DataError, NumericsError, OutputError
from ..runtime.device import moved
from ..tracing.experiment import Trace
from ..tracing.trace import Weight
from .stats import InputStats

STATISTICS = ("absmax", "absmean", "min", "max", "mean")
_KIND = "qlinear statistics"


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """The statistics of a model's inputs, from calibration or from a file.

    inputs: statistics by a weight's name; weights that read one tensor may share them. From a file, samples are empty,
    and tokens is 0 if the file does not say. idle: names of weights that no token reached. fingerprint: of the
    checkpoint.
    """

    inputs: Mapping[str, InputStats]
    idle: frozenset[str] = frozenset()
    fingerprint: str | None = None

    def to(self, device: torch.device) -> "CalibrationStats":
        """The statistics on another device; shared statistics stay shared."""
        there = {id(stats): moved(stats, device) for stats in self.inputs.values()}
        return replace(self, inputs={name: there[id(stats)] for name, stats in self.inputs.items()})

    def of_block(self, prefix: str, trace: Trace) -> dict[Weight, InputStats]:
        """The statistics of all weights that multiplied in a run of the block `prefix`, as `calibrate` returns them.

        Weights that read the same tensor share one `InputStats`; one of their names is enough. Weights that no token
        reached are left out. Raises DataError if another weight is missing, or has another width.
        """
        weights_by_source: dict[Any, list[Weight]] = {}
        widths = {product.weight: product.x.shape[-1] for product in trace.products}
        for weight, source in {p.weight: p.source for p in reversed(trace.products)}.items():
            weights_by_source.setdefault(source, []).append(weight)
        stats_of: dict[Weight, InputStats] = {}
        for weights in weights_by_source.values():
            stats = self._shared({weight: input_name(prefix, weight) for weight in weights})
            if stats is not None:
                _require_width(input_name(prefix, weights[0]), stats, widths[weights[0]])
                stats_of |= dict.fromkeys(weights, stats)
        return stats_of

    def _shared(self, names: Mapping[Weight, str]) -> InputStats | None:
        """The statistics of the one tensor that these weights read; None if no token reached them."""
        for name in names.values():
            if name in self.inputs:
                return self.inputs[name]
        missing = [n for weight, n in names.items() if weight.index is None and n not in self.idle]
        if missing:
            raise DataError(
                f"the statistics hold nothing of {', '.join(missing)}: take them of this model with qlinear calibrate"
            )
        return None


def input_name(prefix: str, weight: Weight) -> str:
    """The name in a file of statistics of a weight of the block `prefix`."""
    index = "" if weight.index is None else f".{weight.index}"
    return f"{prefix}.{weight.name}".removeprefix(".").removesuffix(".weight") + index


def _require_width(name: str, stats: InputStats, width: int) -> None:
    if len(stats.absmax) != width:
        raise DataError(
            f"the statistics of {name} are of {len(stats.absmax)} channels; the weight reads {width}: take them of "
            "this model with qlinear calibrate"
        )


def require_writable(path: str | Path, overwrite: bool = False) -> None:
    """Raise DataError or OutputError, before any work, unless statistics can be written to `path`."""
    path = Path(path)
    _format_of(path)
    if not path.parent.is_dir():
        raise OutputError(
            f"statistics cannot be written to {path}: there is no folder {path.parent}; make it"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists: choose another name, or pass --overwrite")


def save_statistics(path: str | Path, statistics: CalibrationStats) -> None:
    """Write statistics, atomically, in the format of `path`'s suffix."""
    to_bytes, _ = _format_of(Path(path))
    write_atomically(Path(path), to_bytes(statistics))


def load_statistics(path: str | Path, fingerprint: str | None = None) -> CalibrationStats:
    """Read statistics from a file of either format.

    fingerprint: of the checkpoint to quantize. Raises DataError if the file is missing, has another content, or is of
    another model (LMDeploy's files do not say which), and NumericsError if it holds NaN or infinity.
    """
    path = Path(path)
    _, read = _format_of(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}: make it with qlinear calibrate")
    statistics = read(path)
    if fingerprint is not None and statistics.fingerprint not in (None, fingerprint):
        raise DataError(
            f"{path} holds the statistics of another model: take them of this one with qlinear calibrate"
        )
    return statistics


def _format_of(path: Path) -> tuple[Callable[[CalibrationStats], bytes], Callable[[Path], CalibrationStats]]:
    """The functions that write and read the format of this suffix."""
    formats = {".safetensors": (_to_safetensors, _read_safetensors), ".pth": (_to_pickle, _read_pickle)}
    if path.suffix not in formats:
        raise DataError(
            f"statistics are .safetensors, or .pth for LMDeploy's inputs_stats.pth; got {path.name!r}: choose one"
        )
    return formats[path.suffix]


def _to_safetensors(statistics: CalibrationStats) -> bytes:
    first: dict[int, str] = {}
    shared = {name: first.setdefault(id(stats), name) for name, stats in statistics.inputs.items()}
    distinct = {name: statistics.inputs[name] for name in first.values()}
    tensors = {
        f"{name}.{statistic}": getattr(stats, statistic).float().clone()
        for name, stats in distinct.items()
        for statistic in STATISTICS
    }
    metadata = {
        "fingerprint": statistics.fingerprint,
        "tokens": {name: stats.tokens for name, stats in distinct.items()},
        "shared": {name: first_name for name, first_name in shared.items() if name != first_name},
        "idle": sorted(statistics.idle),
    }
    # One entry, because the order of several would change from run to run.
    content: bytes = save(tensors, {_KIND: json.dumps(metadata)})
    return content


def _read_safetensors(path: Path) -> CalibrationStats:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_KIND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}): make it anew with qlinear calibrate") from None
    if metadata is None:
        raise DataError(f"{path} holds no statistics: give a file that qlinear calibrate wrote")
    contents = json.loads(metadata)
    inputs = {
        name: _validated(
            name, {statistic: tensors[f"{name}.{statistic}"] for statistic in STATISTICS}, count, path
        )
        for name, count in contents["tokens"].items()
    }
    inputs |= {name: inputs[first_name] for name, first_name in contents["shared"].items()}
    return CalibrationStats(inputs, frozenset(contents["idle"]), contents["fingerprint"])


def _to_pickle(statistics: CalibrationStats) -> bytes:
    buffer = io.BytesIO()
    tables = {
        statistic: {n: getattr(s, statistic) for n, s in statistics.inputs.items()}
        for statistic in STATISTICS
    }
    torch.save(tables, buffer)
    return buffer.getvalue()


def _read_pickle(path: Path) -> CalibrationStats:
    try:
        tables = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read with weights_only=True ({type(error).__name__}): give LMDeploy's inputs_stats.pth"
        ) from None
    if not _is_lmdeploy_format(tables):
        raise DataError(
            f"{path} must hold {{{', '.join(STATISTICS)}}} -> module name -> tensor: give LMDeploy's inputs_stats.pth"
        )
    # LMDeploy's observers start at -infinity; a module that still has it saw no token.
    idle = frozenset(name for name, high in tables["max"].items() if bool((high == -torch.inf).all()))
    inputs = {
        name: _validated(name, {statistic: tables[statistic][name] for statistic in STATISTICS}, 0, path)
        for name in tables["absmax"]
        if name not in idle
    }
    return CalibrationStats(inputs, idle)


def _is_lmdeploy_format(tables: Any) -> bool:
    """Whether `tables` holds a table of vectors per statistic, all with the same names; other tables are allowed."""
    if not isinstance(tables, dict) or not all(
        isinstance(tables.get(statistic), dict) for statistic in STATISTICS
    ):
        return False
    names = set(tables["absmax"])
    return all(
        set(tables[statistic]) == names and _are_vectors(tables[statistic].values())
        for statistic in STATISTICS
    )


def _are_vectors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) and value.dim() == 1 for value in values)


def _validated(name: str, vectors: Mapping[str, Tensor], tokens: int, path: Path) -> InputStats:
    """One weight's statistics. Raises NumericsError on NaN or infinity, DataError for vectors of different widths."""
    width = len(vectors["absmax"])
    for statistic, vector in vectors.items():
        bad = int((~vector.isfinite()).sum())
        if bad:
            raise NumericsError(
                f"{path} holds {bad} NaN or infinite of {len(vector)} channels in the {statistic} of {name}: calibrate "
                "again in a wider dtype"
            )
        if vector.shape != (width,):
            raise DataError(
                f"{path} holds absmax of {width} channels but {statistic} of {len(vector)} for {name}: calibrate again"
            )
    absmax, absmean, low, high, mean = (vectors[statistic].float() for statistic in STATISTICS)
    return InputStats(absmax, absmean, low, high, mean, tokens, sample=torch.empty(0, width))


def combine(a: InputStats, b: InputStats) -> InputStats:
    """The statistics over the tokens of both, for a weight that the model runs twice."""
    tokens = a.tokens + b.tokens
    share = b.tokens / tokens
    return replace(
        a, absmax=torch.maximum(a.absmax, b.absmax), absmean=a.absmean.lerp(b.absmean, share),
        min=torch.minimum(a.min, b.min), max=torch.maximum(a.max, b.max), mean=a.mean.lerp(b.mean, share),
        tokens=tokens,
    )  # fmt: skip
