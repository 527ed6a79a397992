"""From one layout to another: every quantized linear is unpacked with the one and packed with the other.

No code is touched, and one linear is in memory at a time.
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.checksums import file_checksums
from ..checkpoint.dequantized_view import DequantizedView, quantization_config
from ..checkpoint.layouts import get_layout
from ..checkpoint.layouts.base import Layout
from ..checkpoint.output_dir import clear, require_empty, require_space, write_atomically
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import ShardWriter
from ..errors import CheckpointError, SchemeError
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
    "awq" or "qlinear". Raises QLinearError, before anything is written, if the model is not quantized or the layout
    cannot hold what it has.
    """
    layout, out, source = get_layout(format), Path(out), open_checkpoint(model, revision)
    view = DequantizedView.of(source)
    if not view.schemes:
        raise CheckpointError(
            f"{source.path} is not quantized: `qlinear quantize` it, with --format {format}"
        )
    config = layout.quantization_config(view.schemes, _ignored(source))
    _require_place(view, layout, format)
    require_empty(out, overwrite, source.path)
    require_space(out, source.nbytes)
    clear(out)
    writer = ShardWriter(out, max_shard_size)
    _write(view, layout, writer)
    _finish(source, out, config, writer.checksums)
    return out


def _ignored(source: Checkpoint) -> list[str]:
    """The modules that the source's config leaves in float."""
    config = quantization_config(source) or {}
    return list(config.get("ignore") or config.get("modules_to_not_convert") or [])


def _require_place(view: DequantizedView, layout: Layout, format: str) -> None:
    """Raise SchemeError if a linear keeps a vector that the layout would lose: packing one such linear tells."""
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


def _finish(source: Checkpoint, out: Path, config: dict[str, Any], checksums: Mapping[str, str]) -> None:
    """Every other file as it was, `qlinear.json` with the new checksums, config.json last."""
    for file in [*source.other_files(), Path("README.md")]:
        if (source.path / file).is_file():
            (out / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.path / file, out / file)
    text = json.dumps(source.config | {"quantization_config": config}, indent=2, ensure_ascii=False) + "\n"
    files = file_checksums(out, [str(file) for file in source.other_files()])
    files["config.json"] = f"{zlib.crc32(text.encode()):08x}"
    made_by = source.path / "qlinear.json"
    note = json.loads(made_by.read_text()) if made_by.is_file() else {}
    note["checksums"] = {"tensors": dict(checksums), "files": files}
    note_text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
    write_atomically(out / "qlinear.json", note_text.encode())
    write_atomically(out / "config.json", text.encode())
