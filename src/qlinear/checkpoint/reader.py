"""Opens a checkpoint folder and reads its tensors one at a time.

Opening reads headers and file sizes only, and refuses a folder that is incomplete or damaged before any work starts.
Tensors are read with `preadv` directly into their final memory. Memory maps are not used: the pages of an open map
count towards the process's resident set, so a map over a shard would cost the whole shard.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SourceLostError
from ..runtime.device import Uploader
from .safetensors_header import DTYPES, TensorInfo, parse_json, read_header
from .torch_bin import read_pickled

_CHUNK = 4 << 20
# Bytes per step of a dtype conversion: they and their copies stay in a core's cache.
_CONVERSION_CHUNK = 512 << 10
_TRAINING_DTYPES = {"BF16", "F16", "F32"}
# Bytes of each tensor that enter the fingerprint.
_FINGERPRINT_SAMPLE = 4 << 10
# Not copied to a result: weights in any form, and files that are written anew.
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".index.json",
    ".partial",
)
_WRITTEN_ANEW = ("config.json", "README.md", "qlinear.json")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and weights. Made by `open`; no file stays open.

    path: the folder. config: the content of config.json. tensors: the place of each tensor, by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None) -> "Checkpoint":
        """Read the config and the headers of a folder, or of a Hub id `org/name`, which is downloaded first.

        Raises CheckpointError if it is no checkpoint, or if a file is missing, damaged or truncated.
        """
        folder = _folder(model, revision)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is not a checkpoint: it has no config.json; give one that save_pretrained wrote"
            )
        config = parse_json((folder / "config.json").read_bytes(), folder / "config.json")
        return cls(folder, config, _locate(folder))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def matrix_dtype(self) -> torch.dtype | None:
        """The dtype of all matrices, if they share one and models are trained in it; else None."""
        dtypes = {info.dtype_name for info in self.tensors.values() if len(info.shape) > 1}
        return DTYPES[dtypes.pop()] if len(dtypes) == 1 and dtypes <= _TRAINING_DTYPES else None

    def info(self, name: str) -> TensorInfo:
        """The place, dtype and shape of a tensor. Raises CheckpointError if there is none of that name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor named {name}")
        return self.tensors[name]

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """The tensor of that name, on the CPU; read into `out` (contiguous, same dtype and shape) if given."""
        info = self.info(name)
        if out is None:
            out = torch.empty(info.shape, dtype=info.dtype)
        elif out.dtype != info.dtype or tuple(out.shape) != info.shape or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, {info.dtype} of shape {info.shape}, to read {name}; "
                f"got {out.dtype} of shape {tuple(out.shape)}"
            )
        with _opened(info.file) as file:
            _read_exactly(file, as_bytes(out), info.start, info.file)
        return out

    def read_as(self, name: str, out: Tensor) -> Tensor:
        """Read a tensor into `out` (contiguous, on the CPU, same shape), converted to the dtype of `out`.

        Works in small chunks, which stay in the cache; a whole copy in the file's dtype would pass through memory.
        """
        info = self.info(name)
        if info.dtype == out.dtype:
            return self.read(name, out)
        if tuple(out.shape) != info.shape:
            raise ValueError(f"out must be of shape {info.shape} to read {name}; got {tuple(out.shape)}")
        flat, done = out.view(-1), 0
        for part in self.chunks(name, _CONVERSION_CHUNK):
            values = torch.frombuffer(part, dtype=info.dtype)
            flat[done : done + len(values)].copy_(values)
            done += len(values)
        return out

    def read_to_device(self, name: str, out: Tensor, uploader: Uploader) -> Tensor:
        """Read a tensor into `out` (contiguous, same shape) on an accelerator, converted to the dtype of `out`."""
        info = self.info(name)
        with _opened(info.file) as file:

            def fill(memory: memoryview, before: int) -> None:
                _read_exactly(file, memory, info.start + before, info.file)

            uploader.upload(fill, info.nbytes, info.dtype, out)
        return out

    def chunks(self, name: str, size: int = _CHUNK) -> Iterator[memoryview]:
        """A tensor's bytes, `size` at a time. Each part is valid until the next one is taken."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(size, info.nbytes)))
        with _opened(info.file) as file:
            for start in range(info.start, info.stop, size):
                part = buffer[: min(size, info.stop - start)]
                _read_exactly(file, part, start, info.file)
                yield part

    def expect(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors ahead into its page cache, while other work goes on."""
        if not hasattr(os, "posix_fadvise"):  # as on macOS
            return
        for file, infos in groupby(map(self.info, names), key=lambda info: info.file):
            with _opened(file) as descriptor:
                for info in infos:
                    os.posix_fadvise(descriptor, info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """A hash that identifies the checkpoint: of its config, its headers, and the start of each tensor.

        It does not depend on paths or times. To be quick, most of the data does not enter.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(json.dumps([name, info.dtype_name, info.shape]).encode())
            digest.update(next(self.chunks(name, _FINGERPRINT_SAMPLE), b""))
        return digest.hexdigest()

    def other_files(self) -> list[Path]:
        """The files that are copied to a result: tokenizer, generation config, chat template, licence, `*.py`.

        Paths are relative to the folder; links are followed. Of sub-folders, chat templates and Python code are copied,
        and whole those that `modules.json` names (sentence-transformers' `1_Pooling`). Not copied: weights in any form,
        adapters, hidden files, and files that are written anew (config.json, README.md, qlinear.json).
        """
        adapters = set(self.adapters())
        files = [
            p for p in self.path.iterdir() if p.is_file() and _is_copied(p.name) and not _is_adapter(p.name)
        ]
        for folder in (p for p in self.path.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if folder.name not in adapters:
                files += [p for p in folder.rglob("*") if p.is_file() and self._is_needed(p, folder.name)]
        return sorted(file.relative_to(self.path) for file in files)

    def adapters(self) -> list[str]:
        """The sub-folders that hold an adapter, and "." where the folder itself does. A result does not have them."""
        configs = [*self.path.glob("adapter_config.json"), *self.path.glob("*/adapter_config.json")]
        return sorted(str(config.parent.relative_to(self.path)) for config in configs)

    def _is_needed(self, file: Path, folder: str) -> bool:
        """Whether a file of a sub-folder is copied."""
        if any(part.startswith(".") for part in file.relative_to(self.path).parts):
            return False
        if folder in self._module_folders():
            return True
        return _is_copied(file.name) and (folder == "additional_chat_templates" or file.suffix == ".py")

    def _module_folders(self) -> set[str]:
        """The sub-folders that sentence-transformers' `modules.json` names."""
        try:
            modules = json.loads((self.path / "modules.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return set()
        entries = modules if isinstance(modules, list) else []
        return {str(entry.get("path", "")).split("/")[0] for entry in entries if isinstance(entry, dict)} - {
            ""
        }

    def require_unquantized(self) -> None:
        """Raise CheckpointError if config.json says that the weights are already quantized."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, dict) else None
        config = self.config.get("quantization_config") or nested
        if config:
            method = config.get("quant_method", "unknown") if isinstance(config, dict) else config
            raise CheckpointError(
                f"{self.path} is already quantized (quant_method {method!r}): "
                "give the float checkpoint that it was made from"
            )


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())


def _locate(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder, from the first of four forms: safetensors, its shards, torch.save, its shards."""
    if (folder / "model.safetensors").is_file():
        return read_header(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").is_file():
        return _read_sharded(folder / "model.safetensors.index.json")
    if (folder / "pytorch_model.bin").is_file():
        return read_pickled(folder / "pytorch_model.bin")
    if (folder / "pytorch_model.bin.index.json").is_file():
        return _read_sharded(folder / "pytorch_model.bin.index.json")
    raise CheckpointError(
        f"{folder} is not a checkpoint: it has neither model.safetensors nor an index of shards; "
        "save the model there with save_pretrained"
    )


def _read_sharded(index: Path) -> dict[str, TensorInfo]:
    """The tensors of the shards that an index names: all that they hold, as transformers reads them."""
    weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files: download it again")
    read = read_pickled if index.name.startswith("pytorch_model") else read_header
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        tensors |= read(_shard(index, name))
    return dict(sorted(tensors.items()))


def _shard(index: Path, name: str) -> Path:
    """The file of a shard. Its name must be inside the folder; a link may lead elsewhere, as in Hub caches."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index} names a shard {name!r} outside of its folder: do not trust this checkpoint"
        )
    if not (index.parent / name).is_file():
        raise CheckpointError(
            f"{index.parent / name} is missing, but {index.name} names it: download it again"
        )
    return index.parent / name


def _folder(model: str | Path, revision: str | None) -> Path:
    """The folder itself, or the folder that a Hub id was downloaded to."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or model.count("/") != 1 or model[0] in "./~":
        raise CheckpointError(
            f"no such folder: {model}; give a checkpoint folder or a Hub id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(model, revision=revision, ignore_patterns=["*.gguf", "*.onnx", "original/*"])
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{model} is neither a folder nor a Hub id that can be downloaded ({type(error).__name__}: "
            f"{reason}): check the name and the network, or give a local folder"
        ) from None


def _is_adapter(name: str) -> bool:
    return name.startswith("adapter_")


def _is_copied(name: str) -> bool:
    return not (name.startswith((".", "consolidated.")) or name in _WRITTEN_ANEW or name.endswith(_WEIGHTS))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise _lost(file, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lost(file: Path, error: OSError) -> SourceLostError:
    return SourceLostError(f"{file} cannot be read ({error.strerror}): check the disk, and run again")


def _read_exactly(descriptor: int, into: memoryview, offset: int, file: Path) -> None:
    """Fill `into` from `offset`. The kernel may return fewer bytes than asked for (2 GiB at most)."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise _lost(file, error) from error
        if count == 0:
            raise SourceLostError(
                f"{file} ended at byte {offset + done:,} while it was read: it was changed; restore it and run again"
            )
        done += count
