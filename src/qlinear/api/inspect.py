"""`qlinear inspect`: every linear, its bytes before and after, and where its smoothing lives.

A finished checkpoint is described from its tensors and its `qlinear.json`. A float checkpoint, or a config alone, gets
a plan: one block of each kind runs with random weights, which shows the linears that share a vector and the module that
can take it. Neither depends on the values of the weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.checksums import read_note
from ..checkpoint.dequantized_view import quantization_config
from ..checkpoint.layouts import MigrationPolicy, get_layout, supported_migration
from ..checkpoint.layouts.base import Layout, packed_bytes
from ..checkpoint.reader import Checkpoint
from ..checkpoint.safetensors_header import DTYPE_NAMES, TensorInfo
from ..formats.scheme import Scheme, get_scheme
from ..pipeline.select_layers import is_parameter, make_plan, quantizable, replaced_bytes
from ..streaming.meta_model import build_meta_model
from ..streaming.open_model import open_checkpoint
from ..streaming.streamed_model import StreamedModel
from ..tracing.on_meta import groups_on_meta

Migration = Literal["folded", "kept", "none"]
# The first of the linears that share an input, and the module that can take their smoothing, if there is one.
_Home = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """One linear of a model's blocks.

    shape: (out, in); (experts, out, in) of a stack. scheme: None if it stays in float. scale_shape: of its weight's
    scales. bytes_before and bytes_after: of all its tensors. group: the first of the linears that share its input.
    migration: where its smoothing vector lives; folded_into: the module that took it.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str | None
    scale_shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    group: str | None
    migration: Migration
    folded_into: str | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """All linears of a model's blocks, and the bytes of all its tensors before and after quantization."""

    linears: tuple[LinearInfo, ...]
    total_size_before: int
    total_size: int


def inspect(
    model: str | Path,
    scheme: str | Scheme = "w8a8",
    *,
    format: str = "compressed-tensors",
    migration_scale: MigrationPolicy = "unfolded",
    ignore: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Inspection:
    """Every linear of a checkpoint, or of the model that a config.json alone describes.

    model: a checkpoint folder, a Hub id, "demo", a config.json, or a folder with nothing else. scheme, format,
    migration_scale, ignore: what to plan for, where nothing is quantized yet; as for `qlinear.quantize`.
    Raises QLinearError.
    """
    layout = get_layout(format)
    checkpoint = _with_or_without_weights(model, revision, trust_remote_code)
    source = StreamedModel(checkpoint, torch.float32, trust_remote_code)
    if quantization_config(source.checkpoint) is not None:
        return _finished(source)
    wanted = get_scheme(scheme)
    keep = supported_migration(migration_scale, format, wanted)
    return _planned(source, wanted, ignore, layout.HOLDS_TRANSPOSED, layout, keep)


def _with_or_without_weights(model: str | Path, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    path = Path(model)
    config = path if path.is_file() else path / "config.json"
    bare = (
        config.is_file()
        and not any(config.parent.glob("*.safetensors*"))
        and not any(config.parent.glob("*.bin*"))
    )
    if path.is_file() or bare:
        return imagined_checkpoint(config, trust_remote_code)
    return open_checkpoint(model, revision)


def imagined_checkpoint(config: Path, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that a config describes: names, shapes and dtypes of all tensors, and no data."""
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shape = tuple(tensor.shape)
            tensors[name] = TensorInfo(config, DTYPE_NAMES[tensor.dtype], shape, 0, tensor.nbytes)
    return Checkpoint(config, json.loads(config.read_text()), tensors)


def _planned(
    source: StreamedModel,
    scheme: Scheme,
    ignore: Sequence[str] | None,
    transposed: bool,
    layout: Layout,
    keep: MigrationPolicy,
) -> Inspection:
    chosen = make_plan(source, scheme, ignore, transposed).chosen
    homes = _homes(source)
    linears = tuple(
        _planned_linear(source, scheme, name, shape, homes.get(name), layout, keep)
        if name in chosen
        else _float_linear(source, name, shape, homes.get(name))
        for name, shape in quantizable(source, transposed=True)
    )
    grown = sum(linear.bytes_after - linear.bytes_before for linear in linears)
    return Inspection(linears, source.checkpoint.nbytes, source.checkpoint.nbytes + grown)


def _homes(source: StreamedModel) -> dict[str, _Home]:
    """For each linear of the blocks: the first of its group, and the module that can take its smoothing."""
    homes: dict[str, _Home] = {}
    for block, groups in groups_on_meta(source.model, source.blocks, source.head).items():
        for group in groups:
            leader = f"{block}.{group.weights[0].module}"
            folded_into = f"{block}.{group.fold.producer.name}" if group.fold else None
            for weight in group.weights:
                name = weight.module if weight.index is None else weight.name
                homes[f"{block}.{name}"] = (leader, folded_into)
    return homes


def _planned_linear(
    source: StreamedModel,
    scheme: Scheme,
    name: str,
    shape: tuple[int, ...],
    home: _Home | None,
    layout: Layout,
    keep: MigrationPolicy,
) -> LinearInfo:
    before, migration = _bytes_of(source, name), _migration(shape, home, keep)
    stored = source.stored_dtype(name if is_parameter(source, name) else f"{name}.weight")
    packed = packed_bytes(layout, scheme, shape, stored, migration == "kept")
    group, producer = home or (None, None)
    return LinearInfo(
        name, shape, scheme.name, scheme.weight.scale_shape(shape), before,
        before + packed - replaced_bytes(source, name),
        group, migration, producer if migration == "folded" else None,
    )  # fmt: skip


def _float_linear(source: StreamedModel, name: str, shape: tuple[int, ...], home: _Home | None) -> LinearInfo:
    nbytes = _bytes_of(source, name)
    return LinearInfo(name, shape, None, (), nbytes, nbytes, home[0] if home else None, "none", None)


def _migration(shape: tuple[int, ...], home: _Home | None, keep: MigrationPolicy) -> Migration:
    """Where the smoothing of a quantized linear will live. A stack of experts has no place for a vector."""
    if home is None:
        return "none"
    if home[1] is not None and keep != "always":
        return "folded"
    return "kept" if keep != "never" and len(shape) == 2 else "none"


def _bytes_of(source: StreamedModel, name: str, leaf: str = "") -> int:
    """Bytes of the tensors of a linear, or of a stack, in the file. leaf: count only tensors of that last name."""
    keys = source.names.sources(name if is_parameter(source, name) else f"{name}.weight")
    modules = tuple(f"{key.removesuffix('.weight')}." for key in keys)
    tensors = source.checkpoint.tensors.items()
    return sum(info.nbytes for key, info in tensors if key.startswith(modules) and key.endswith(leaf))


def _finished(source: StreamedModel) -> Inspection:
    """The inspection of a quantized checkpoint."""
    note = read_note(source.checkpoint)
    recorded = {layer["name"]: layer for layer in note.get("layers", [])}
    # Other tools do not note what they started from. The config's dtype then stands for the source's.
    dtype = build_meta_model(source.checkpoint.path, trust_remote_code=source.trust_remote_code).dtype
    linears = tuple(
        _finished_linear(source, name, shape, recorded.get(name, {}), dtype.itemsize)
        for name, shape in quantizable(source, transposed=True)
    )
    grown = sum(info.bytes_before - info.bytes_after for info in linears)
    before = note.get("source", {}).get("total_size", source.checkpoint.nbytes + grown)
    return Inspection(linears, before, source.checkpoint.nbytes)


def _finished_linear(
    source: StreamedModel, name: str, shape: tuple[int, ...], recorded: Mapping[str, Any], itemsize: int
) -> LinearInfo:
    scheme = source.scheme_of(name)
    after = _bytes_of(source, name)
    before = after - _bytes_of(source, name, ".migration_scale")
    scales: tuple[int, ...] = ()
    if scheme is not None:
        scales = scheme.weight.scale_shape(shape)
        bias = source.checkpoint.tensors.get(f"{name}.bias")
        before = prod(shape) * itemsize + (bias.nbytes if bias else 0)
    return LinearInfo(
        name, shape, scheme.name if scheme else None, scales, before, after,
        recorded.get("group"), recorded.get("migration", "none"), recorded.get("folded_into"),
    )  # fmt: skip
