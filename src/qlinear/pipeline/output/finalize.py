"""What makes a folder of shards a checkpoint: config, tokenizer, model card, and a note of how it was made."""

import json
import platform
import shutil
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ...checkpoint.checksums import file_checksums
from ...checkpoint.output_dir import write_atomically, writing_to
from ...checkpoint.reader import Checkpoint
from ...streaming.streamed_model import StreamedModel

# Keys of a model card that hold for its quantized copy too.
_INHERITED = ("license", "license_name", "license_link", "language")


def finish(
    folder: Path,
    source: StreamedModel,
    quantization_config: dict[str, Any] | None,
    untied: bool,
    record: Mapping[str, Any],
    checksums: Mapping[str, str],
) -> None:
    """Make the folder of a job's shards a checkpoint.

    source: the float model. untied: whether the output head left the embedding that it shared. record: the settings
    and the layers' figures, for `qlinear.json`. checksums: CRC-32 by tensor, from the writer. Raises OutputError.
    """
    checkpoint = source.checkpoint
    made_from = {
        "name": source.name,
        "total_size": checkpoint.nbytes,
        "fingerprint": checkpoint.fingerprint(),
    }
    config = result_config(checkpoint.config, quantization_config, untied)
    note = dict(record) | {"source": made_from, "versions": versions()}
    complete(folder, checkpoint, config, note, checksums, model_card(source, record))


def complete(
    folder: Path,
    source: Checkpoint,
    config: Mapping[str, Any],
    note: Mapping[str, Any],
    checksums: Mapping[str, str],
    card: str | None,
) -> None:
    """Copy the source's other files; write the model card, `qlinear.json` and, last, config.json.

    A folder with a config.json is therefore whole. note: what `qlinear.json` says; the checksums are added to it.
    card: the text of README.md, or None for no card. Raises OutputError where the disk refuses a file.
    """
    others = source.other_files()
    for file in others:
        with writing_to(folder / file):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file, folder / file)
    config_bytes = _json(config)
    files = file_checksums(folder, [str(file) for file in others])
    files["config.json"] = f"{zlib.crc32(config_bytes):08x}"
    sums = {"tensors": dict(checksums), "files": files}
    if card is not None:
        write_atomically(folder / "README.md", card.encode(errors="replace"))
    write_atomically(folder / "qlinear.json", _json(dict(note) | {"checksums": sums}))
    write_atomically(folder / "config.json", config_bytes)


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
    """The text of README.md: base model, licence and languages for the Hub to read, and the job's settings."""
    from huggingface_hub import ModelCard, ModelCardData

    base, settings = source.checkpoint.config.get("_name_or_path") or source.name, record["settings"]
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized",
        tags=["quantized", "qlinear"],
        **_inherited(source.checkpoint.path / "README.md"),
    )
    made = f"{base}, quantized with qlinear {version('qlinear')}."
    rows = "\n".join(f"- {key}: {value}" for key, value in settings.items())
    title = f"# {Path(base).name}, {settings['scheme']}"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{title}\n\n{made}\n\n{rows}\n"))


def _inherited(card: Path) -> dict[str, Any]:
    """What a source's card says that holds for the result too."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not card.is_file():
        return {}
    head = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace"))
    metadata = _mapping(head[2]) if head else {}
    return {key: metadata[key] for key in _INHERITED if key in metadata}


def _mapping(text: str) -> dict[str, Any]:
    """The mapping that a YAML text is. Of a damaged one its sound lines: a licence must not get lost."""
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError:
        lines = text.splitlines()
        return {k: v for line in lines for k, v in _mapping(line).items()} if len(lines) > 1 else {}
    return metadata if isinstance(metadata, dict) else {}


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a surrogate without a partner, which only an escape can stand for
        return (json.dumps(value, indent=2) + "\n").encode()
