"""`qlinear convert`: from one layout on disk to another.

Each quantized linear is unpacked with the source's layout and packed with the other; its codes stay as they are. One
linear is in memory at a time. The folder is completed as a job's is, by `pipeline/output/finalize.py`.
"""

from contextlib import suppress
from pathlib import Path

from ..checkpoint.checksums import read_note
from ..checkpoint.dequantized_view import DequantizedView, quantization_config
from ..checkpoint.layouts import get_layout
from ..checkpoint.layouts.base import Layout
from ..checkpoint.output_dir import clear, require_empty, require_space
from ..checkpoint.reader import Checkpoint
from ..checkpoint.replace_dir import holds_checkpoint, staging_dir, swap
from ..checkpoint.writer import ShardWriter
from ..errors import CheckpointError, QLinearError, SchemeError
from ..pipeline.output.finalize import complete, result_config
from ..streaming.open_model import open_checkpoint


def convert(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    revision: str | None = None,
) -> Path:
    """Write a quantized checkpoint in another layout, without calibration; returns the folder.

    model: a quantized checkpoint's folder or Hub id. out: the folder to make. format: "compressed-tensors", "lmdeploy",
    "awq" or "qlinear". max_shard_size: bytes of one shard. overwrite: whether to replace the checkpoint in `out`.
    revision: branch, tag or commit of a Hub id. Raises QLinearError, before anything is written, where the model is
    not quantized or the layout has no place for what it holds.
    """
    layout, out, source = get_layout(format), Path(out).expanduser(), open_checkpoint(model, revision)
    view = DequantizedView.of(source)
    if not view.schemes:
        raise CheckpointError(
            f"{source.path} is not quantized: `qlinear quantize` it, with --format {format}"
        )
    config = layout.quantization_config(view.schemes, _ignored(source))
    _require_place(view, layout, format)
    note, card = read_note(source), _card(source)
    require_empty(out, overwrite, source.path)
    require_space(out, source.nbytes)
    target = staging_dir(out) if holds_checkpoint(out) else out
    result, existed = result_config(source.config, config, untied=False), target.is_dir()
    clear(target)
    try:
        writer = ShardWriter(target, max_shard_size)
        _write(view, layout, writer)
        complete(target, source, result, note, writer.checksums, card)
    except QLinearError:
        clear(target)
        if not existed:
            with suppress(OSError):  # not empty, or not made
                target.rmdir()
        raise
    if target != out:
        swap(target, out)
    return out


def _ignored(source: Checkpoint) -> list[str]:
    """The modules that the source's config leaves in float."""
    config = quantization_config(source) or {}
    return list(config.get("ignore") or config.get("modules_to_not_convert") or [])


def _require_place(view: DequantizedView, layout: Layout, format: str) -> None:
    """Raise SchemeError if the layout would lose a migration scale. Packing the first linear that has one tells."""
    for module in view.schemes:
        if f"{module}.migration_scale" in view.stored.tensors:
            layout.pack(module, view.linear(module))
            if format == "awq":
                raise SchemeError(
                    f"{module} keeps a migration scale, which awq has no place for: use --format qlinear"
                )
            return


def _write(view: DequantizedView, layout: Layout, writer: ShardWriter) -> None:
    for module in view.schemes:
        for name, tensor in layout.pack(module, view.linear(module)).items():
            writer.add(name, tensor)
    for name in view.stored.tensors:
        module, _, leaf = name.rpartition(".")
        if module not in view.schemes or leaf == "bias":
            writer.copy(name, view.stored)
    writer.finish()


def _card(source: Checkpoint) -> str | None:
    """The source's model card, which holds for the result too."""
    file = source.path / "README.md"
    return file.read_text(errors="replace") if file.is_file() else None
