"""The journal of a run, from which a killed run resumes and writes the same bytes.

The folder `.qlinear` in the output holds, until the result is whole:

    lock                        held while a process writes there; the system releases it when the process dies
    journal.json                settings, finished blocks, and the length of the shards after the last of them
    block-NNNNN.safetensors     the smoothing of a finished block, with which the calibration set passes it again

A block enters the journal after its tensors are on the disk. On resuming, longer shards are cut to the noted length.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...checkpoint.output_dir import clear, write_atomically, writing_to
from ...checkpoint.writer import ShardWriter
from ...errors import OutputError
from ...streaming.streamed_model import StreamedModel
from ...tracing.trace import Weight
from ..block import BlockResult, Layer
from ..smoothing import Smoothing
from .sink import BlockRecord, Done, Sink

_FOLDER = ".qlinear"


class Journal:
    """The journal of a run into `out`; `open` resumes or begins it, `remove` ends it.

    done: the blocks that an earlier run with the same settings has finished. shards: the writer's state then, None if
    it finished none.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], lock: FileLock) -> None:
        self.folder, self.settings = out / _FOLDER, dict(settings)
        self.done = Done()
        self.shards: dict[str, Any] | None = None
        self._lock = lock
        self._thread = ThreadPoolExecutor(1, "journal")
        self._pending: Future[None] | None = None

    @classmethod
    def open(cls, out: str | Path, settings: Mapping[str, Any]) -> "Journal":
        """Resume the journal in `out`, or begin one.

        Raises OutputError where another run writes there, or where an unfinished run had other settings; it names them.
        """
        folder = Path(out) / _FOLDER
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self = cls(Path(out), settings, _locked(folder))
        file = folder / "journal.json"
        if file.is_file():
            self._resume(json.loads(file.read_text()))
        else:
            write_atomically(file, self._entry(None))
        return self

    def _resume(self, entry: Mapping[str, Any]) -> None:
        before = entry["settings"]
        differ = [
            f"{key} was {before.get(key)!r} and is now {self.settings.get(key)!r}"
            for key in sorted({*before, *self.settings})
            if before.get(key) != self.settings.get(key)
        ]
        if differ:
            self.close()
            raise OutputError(
                f"{self.folder.parent} holds an unfinished run with other settings ({'; '.join(differ)}): "
                "use those, choose another folder, or start anew with --no-resume"
            )
        layers = [Layer(**layer | {"curve": tuple(map(tuple, layer["curve"]))}) for layer in entry["layers"]]
        self.done = Done(entry["blocks"], layers, entry["warnings"])
        self.shards = entry["shards"]

    def record(
        self, result: BlockResult, layers: Sequence[Layer], warnings: Sequence[str], sink: Sink
    ) -> None:
        """Note a block that is in the shards. It is made durable in a thread, while the next block is worked on."""
        self.flush()
        file, smoothing = self._file(len(self.done.blocks)), _record_as_bytes(result)
        shards, sync = sink.commit()
        self.done = Done([*self.done.blocks, result.name], list(layers), list(warnings))
        entry = self._entry(shards)

        def save() -> None:
            sync()
            write_atomically(file, smoothing)
            write_atomically(self.folder / "journal.json", entry)

        self._pending = self._thread.submit(save)

    def flush(self) -> None:
        """Wait until what was recorded is on the disk. Raises OutputError if it cannot be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _entry(self, shards: dict[str, Any] | None) -> bytes:
        """The journal as it is to be on the disk."""
        layers = [{key: getattr(layer, key) for key in Layer.__slots__} for layer in self.done.layers]
        entry = {
            "settings": self.settings, "blocks": self.done.blocks, "layers": layers,
            "warnings": self.done.warnings, "shards": shards,
        }  # fmt: skip
        return json.dumps(entry).encode()

    def record_of(self, block: str) -> BlockRecord:
        """What a finished block became."""
        with safe_open(self._file(self.done.blocks.index(block)), "pt") as stored:
            names = stored.metadata()

            def vectors(part: str) -> list[tuple[Any, Tensor]]:
                return [
                    (key, stored.get_tensor(f"{part}.{i}")) for i, key in enumerate(json.loads(names[part]))
                ]

            by_weight = {
                part: {Weight(*key): vector for key, vector in vectors(part)}
                for part in ("columns", "rows", "migration")
            }
            columns, rows, migration = by_weight.values()
            smoothing = Smoothing(columns, rows, migration, vectors=dict(vectors("vectors")))
            return BlockRecord(smoothing, dict(vectors("refined")))

    def _file(self, position: int) -> Path:
        return self.folder / f"block-{position:05d}.safetensors"

    def close(self) -> None:
        """Release the folder, so that another run can resume it."""
        self._thread.shutdown()  # pending writes are completed
        self._lock.release()

    def moved(self, out: Path) -> None:
        """The folder that is written is `out` now: it was renamed."""
        self.folder = out / _FOLDER

    def remove(self) -> None:
        """Delete the journal: the result is whole."""
        self._thread.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def begin(out: Path, settings: Mapping[str, Any], max_shard_size: int) -> tuple[ShardWriter, Journal]:
    """The writer and the journal of a run into `out`: resumed where an earlier run stopped, or new."""
    journal = Journal.open(out, settings)
    try:
        if journal.shards is None:
            clear(out)
            return ShardWriter(out, max_shard_size), journal
        return ShardWriter.resume(out, journal.shards), journal
    except BaseException:
        journal.close()
        raise


def identity(source: StreamedModel, tokens: Tensor | None) -> dict[str, str]:
    """What, besides its settings, decides what a run writes: the model, the text, and who computes."""
    text = "none" if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    packages = {name: version(name) for name in ("qlinear", "torch", "transformers")}
    model = source.checkpoint.fingerprint()[:16]
    return {"model": model, "calibration": text, "device": source.device.type, **packages}


def is_unfinished(out: str | Path) -> bool:
    """Whether a folder holds the remains of a run."""
    return (Path(out) / _FOLDER).is_dir()


def can_resume(out: str | Path) -> bool:
    """Whether a folder holds a run that got as far as its journal: its weights were found to be sound."""
    return (Path(out) / _FOLDER / "journal.json").is_file()


def discard(out: str | Path) -> None:
    """Give up an unfinished run. Raises OutputError where it is still at work."""
    folder = Path(out) / _FOLDER
    if folder.is_dir():
        lock = _locked(folder)
        shutil.rmtree(folder)
        lock.release()


def _locked(folder: Path) -> FileLock:
    """The folder's lock, held. Raises OutputError if another process holds it."""
    lock = FileLock(folder / "lock", timeout=0, thread_local=False)
    with writing_to(folder):
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"another run is writing to {folder.parent}: wait for it, or choose another folder"
            ) from None
    return lock


def _record_as_bytes(result: BlockResult) -> bytes:
    """All that smoothing and refining did to a block, beside its codes, as a safetensors file."""
    smoothing = result.smoothing
    by_weight = {"columns": smoothing.columns, "rows": smoothing.rows, "migration": smoothing.migration}
    keys: dict[str, list[Any]] = {
        part: [[w.name, w.transposed, w.index, w.slices] for w in vectors]
        for part, vectors in by_weight.items()
    }
    by_name: dict[str, Mapping[str, Tensor]] = {"vectors": smoothing.vectors, "refined": result.refined}
    keys |= {part: list(vectors) for part, vectors in by_name.items()}
    everything: dict[str, Mapping[Any, Tensor]] = {**by_weight, **by_name}
    tensors = {
        f"{part}.{i}": _copied(vector)
        for part, vectors in everything.items()
        for i, vector in enumerate(vectors.values())
    }
    return bytes(save(tensors, {part: json.dumps(names) for part, names in keys.items()}))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()
