"""What makes a folder of shards a checkpoint: config, tokenizer, model card, and a note of how it was made."""

import json
import platform
import shutil
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...checkpoint.checksums import file_checksums
from ...checkpoint.output_dir import write_atomically, writing_to
from ...streaming.streamed_model import StreamedModel


def finish(
    folder: Path,
    source: StreamedModel,
    quantization_config: dict[str, Any] | None,
    untied: bool,
    record: Mapping[str, Any],
    checksums: Mapping[str, str],
) -> None:
    """Copy what is not weights from the source, and write the card, `qlinear.json` and, last, config.json.

    checksums: of the tensors; those of the other files are added to them.
    """
    checkpoint = source.checkpoint
    for file in checkpoint.other_files():
        target = folder / file
        with writing_to(target):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / file, target)
    made_from = {
        "name": source.name,
        "total_size": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint(),
    }
    config = _json(result_config(checkpoint.config, quantization_config, untied))
    files = file_checksums(folder, [str(file) for file in checkpoint.other_files()])
    files["config.json"] = f"{zlib.crc32(config):08x}"
    sums = {"tensors": dict(checksums), "files": files}
    note = dict(record) | {"source": made_from, "versions": versions(), "checksums": sums}
    write_atomically(folder / "README.md", model_card(source, record).encode())
    write_atomically(folder / "qlinear.json", _json(note))
    write_atomically(folder / "config.json", config)


def result_config(
    config: dict[str, Any], quantization_config: dict[str, Any] | None, untied: bool
) -> dict[str, Any]:
    """The source's config with the result's quantization; `untied` where the output head left the embedding."""
    result = dict(config)
    if quantization_config is not None:
        result["quantization_config"] = quantization_config
    if untied:
        result["tie_word_embeddings"] = False
        if "tie_word_embeddings" in result.get("text_config", {}):
            result["text_config"] = result["text_config"] | {"tie_word_embeddings": False}
    return result


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of a result."""
    packages = {name: version(name) for name in ("qlinear", "torch", "transformers", "safetensors")}
    return packages | {"python": platform.python_version()}


def model_card(source: StreamedModel, record: Mapping[str, Any]) -> str:
    """README.md: the base model and its licence, and what was done to it."""
    head = _front_matter(source.checkpoint.path / "README.md")
    base = source.checkpoint.config.get("_name_or_path") or source.name
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "base_model_relation: quantized",
        "tags: [quantized, qlinear]",
    ]
    lines += [
        f"{key}: {head[key]}"
        for key in ("license", "license_name", "license_link", "language")
        if key in head
    ]
    settings = "\n".join(f"- {key}: {value}" for key, value in record["settings"].items())
    title = f"# {Path(base).name}, {record['settings']['scheme']}"
    made = f"{base}, quantized with qlinear {version('qlinear')}."
    return "\n".join([*lines, "---", "", title, "", made, "", settings, ""])


def _front_matter(card: Path) -> dict[str, str]:
    """The plain `key: value` lines at the head of a model card."""
    if not card.is_file():
        return {}
    text = card.read_text(errors="replace")
    if not text.startswith("---"):
        return {}
    lines = text.split("---", 2)[1].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith((" ", "-")))
    return {key.strip(): value.strip() for key, value in pairs if value.strip()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
