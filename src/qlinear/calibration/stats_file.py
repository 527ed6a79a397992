"""Statistics of the inputs of a model's weights on disk: calibrate once, quantize as often as you like.

The file's suffix says which of two forms it has:

    .safetensors   `NAME.absmax`, `.absmean`, `.min`, `.max` and `.mean`, each (in,) float32, once for all weights that
                   read one tensor; the metadata says which those are, how many tokens there were, and of which model
    .pth           LMDeploy's `inputs_stats.pth`: {absmax, absmean, max, mean, min} -> name -> (in,)

A weight goes by the name of its module, a parameter that is nobody's `weight` by its own, and one matrix of a stack
of experts by that and its index.
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

FORMS = ("absmax", "absmean", "min", "max", "mean")
_KIND = "qlinear statistics"


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """What calibration found of a model, or what a file holds of that.

    inputs: by a weight's name; weights that read one tensor may share one. Samples are empty, and tokens 0 where the
    file does not tell. idle: names of weights that no token reached. fingerprint: of the model's checkpoint.
    """

    inputs: Mapping[str, InputStats]
    idle: frozenset[str] = frozenset()
    fingerprint: str | None = None

    def to(self, device: torch.device) -> "CalibrationStats":
        """The same on another device; what several weights share stays shared."""
        there = {id(stats): moved(stats, device) for stats in self.inputs.values()}
        return replace(self, inputs={name: there[id(stats)] for name, stats in self.inputs.items()})

    def of_block(self, prefix: str, trace: Trace) -> dict[Weight, InputStats]:
        """The statistics of all weights that multiplied in a run of the block `prefix`, as `calibrate` gives them.

        Weights that read the very same tensor share one `InputStats`, and it is enough that one of them is named. Left
        out is what no token reached. Raises DataError if another is missing, or has another width.
        """
        readers: dict[Any, list[Weight]] = {}
        widths = {product.weight: product.x.shape[-1] for product in trace.products}
        for weight, source in {p.weight: p.source for p in reversed(trace.products)}.items():
            readers.setdefault(source, []).append(weight)
        found: dict[Weight, InputStats] = {}
        for weights in readers.values():
            stats = self._shared({weight: input_name(prefix, weight) for weight in weights})
            if stats is not None:
                _require_width(input_name(prefix, weights[0]), stats, widths[weights[0]])
                found |= dict.fromkeys(weights, stats)
        return found

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
    """What a weight of the block `prefix` is called in a file of statistics."""
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
    _form(path)
    if not path.parent.is_dir():
        raise OutputError(
            f"statistics cannot be written to {path}: there is no folder {path.parent}; make it"
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists: choose another name, or pass --overwrite")


def save_statistics(path: str | Path, statistics: CalibrationStats) -> None:
    """Write statistics in the form that the suffix of `path` names; a reader never sees half a file."""
    to_bytes, _ = _form(Path(path))
    write_atomically(Path(path), to_bytes(statistics))


def load_statistics(path: str | Path, fingerprint: str | None = None) -> CalibrationStats:
    """Statistics from a file of either form.

    fingerprint: of the checkpoint that they are for. Raises DataError if the file is missing, is no such file, or was
    made of another model (which LMDeploy's do not tell), and NumericsError if it holds NaN or infinity.
    """
    path = Path(path)
    _, read = _form(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}: make it with qlinear calibrate")
    statistics = read(path)
    if fingerprint is not None and statistics.fingerprint not in (None, fingerprint):
        raise DataError(
            f"{path} holds the statistics of another model: take them of this one with qlinear calibrate"
        )
    return statistics


def _form(path: Path) -> tuple[Callable[[CalibrationStats], bytes], Callable[[Path], CalibrationStats]]:
    """How to write and read a file of this suffix."""
    forms = {".safetensors": (_to_safetensors, _read_safetensors), ".pth": (_to_pickle, _read_pickle)}
    if path.suffix not in forms:
        raise DataError(
            f"statistics are .safetensors, or .pth for LMDeploy's inputs_stats.pth; got {path.name!r}: choose one"
        )
    return forms[path.suffix]


def _to_safetensors(statistics: CalibrationStats) -> bytes:
    first: dict[int, str] = {}
    shared = {name: first.setdefault(id(stats), name) for name, stats in statistics.inputs.items()}
    held = {name: statistics.inputs[name] for name in first.values()}
    tensors = {
        f"{name}.{form}": getattr(stats, form).float().clone()
        for name, stats in held.items()
        for form in FORMS
    }
    about = {
        "fingerprint": statistics.fingerprint,
        "tokens": {name: stats.tokens for name, stats in held.items()},
        "shared": {name: leader for name, leader in shared.items() if name != leader},
        "idle": sorted(statistics.idle),
    }
    # One entry: several come in an order that changes from run to run.
    made: bytes = save(tensors, {_KIND: json.dumps(about)})
    return made


def _read_safetensors(path: Path) -> CalibrationStats:
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KIND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}): make it anew with qlinear calibrate") from None
    if about is None:
        raise DataError(f"{path} holds no statistics: give a file that qlinear calibrate wrote")
    known = json.loads(about)
    inputs = {
        name: _checked(name, {form: tensors[f"{name}.{form}"] for form in FORMS}, count, path)
        for name, count in known["tokens"].items()
    }
    inputs |= {name: inputs[leader] for name, leader in known["shared"].items()}
    return CalibrationStats(inputs, frozenset(known["idle"]), known["fingerprint"])


def _to_pickle(statistics: CalibrationStats) -> bytes:
    buffer = io.BytesIO()
    tables = {form: {n: getattr(s, form) for n, s in statistics.inputs.items()} for form in FORMS}
    torch.save(tables, buffer)
    return buffer.getvalue()


def _read_pickle(path: Path) -> CalibrationStats:
    try:
        tables = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read with weights_only=True ({type(error).__name__}): give LMDeploy's inputs_stats.pth"
        ) from None
    if not _are_tables(tables):
        raise DataError(
            f"{path} must hold {{{', '.join(FORMS)}}} -> module name -> tensor: give LMDeploy's inputs_stats.pth"
        )
    # LMDeploy's observers begin at -infinity: a module that is still there saw no token.
    idle = frozenset(name for name, high in tables["max"].items() if bool((high == -torch.inf).all()))
    inputs = {
        name: _checked(name, {form: tables[form][name] for form in FORMS}, 0, path)
        for name in tables["absmax"]
        if name not in idle
    }
    return CalibrationStats(inputs, idle)


def _are_tables(tables: Any) -> bool:
    """Whether this is a table of vectors for each form, all with the same names; other tables may stand beside."""
    if not isinstance(tables, dict) or not all(isinstance(tables.get(form), dict) for form in FORMS):
        return False
    names = set(tables["absmax"])
    return all(set(tables[form]) == names and _are_vectors(tables[form].values()) for form in FORMS)


def _are_vectors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) and value.dim() == 1 for value in values)


def _checked(name: str, vectors: Mapping[str, Tensor], tokens: int, path: Path) -> InputStats:
    """One weight's statistics. Raises NumericsError for what is no number, DataError for vectors of several widths."""
    width = len(vectors["absmax"])
    for form, vector in vectors.items():
        bad = int((~vector.isfinite()).sum())
        if bad:
            raise NumericsError(
                f"{path} holds {bad} NaN or infinite of {len(vector)} channels in the {form} of {name}: calibrate "
                "again in a wider dtype"
            )
        if vector.shape != (width,):
            raise DataError(
                f"{path} holds absmax of {width} channels but {form} of {len(vector)} for {name}: calibrate again"
            )
    absmax, absmean, low, high, mean = (vectors[form].float() for form in FORMS)
    return InputStats(absmax, absmean, low, high, mean, tokens, sample=torch.empty(0, width))


def merged(a: InputStats, b: InputStats) -> InputStats:
    """The statistics of the tokens of both: of a weight that the model passes twice."""
    tokens = a.tokens + b.tokens
    share = b.tokens / tokens
    return replace(
        a, absmax=torch.maximum(a.absmax, b.absmax), absmean=a.absmean.lerp(b.absmean, share),
        min=torch.minimum(a.min, b.min), max=torch.maximum(a.max, b.max), mean=a.mean.lerp(b.mean, share),
        tokens=tokens,
    )  # fmt: skip
