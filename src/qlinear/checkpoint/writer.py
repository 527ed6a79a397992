"""Writes safetensors shards tensor by tensor, so that memory holds one tensor at a time and never a shard.

The header. A safetensors file starts with a header that names all its tensors, and it is known only once the last one
is written. So each shard reserves space for it, which is filled when the shard closes and padded with spaces, as JSON
allows. A shard closes when the next tensor would overflow that space or the shard's size.

Resuming. Until `finish`, shards are hidden files under names that no reader takes for a checkpoint. `commit` makes
everything so far durable and returns its extent as a little JSON. `resume` truncates a folder to that extent. The same
tensors in the same order give the same bytes, whether or not the writer was interrupted.
"""

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError
from .checksums import checksum
from .output_dir import sync_folder, write_atomically, writing_to
from .reader import Checkpoint, as_bytes
from .safetensors_header import BITS, DTYPE_NAMES, DTYPES, read_header

DEFAULT_SHARD_SIZE = 5 * 10**9
# Enough for some 700 tensors: more than a shard of a dense model has. A shard of many small experts closes early.
_HEADER_ROOM = 128 << 10
# A tensor must start at a multiple of its element size, or torch refuses to view it.
_ALIGNMENT = 8
_PARTIAL = ".model-{:05d}.safetensors.partial"


@dataclass
class _Shard:
    """The current shard; plain values, so that the journal can store it as JSON.

    entries: its header. late: header entries, with their data in base64, of tensors that are written when it closes.
    size: bytes of data in the file. late_size: bytes of data in `late`. room: bytes left for the header.
    """

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    late: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0
    late_size: int = 0
    room: int = _HEADER_ROOM - 64


class ShardWriter:
    """Writes tensors into `folder`, which it creates, in shards of at most `max_shard_size` bytes of data.

    A larger tensor has a shard of its own. Every method raises OutputError where the disk is full. checksums: of the
    tensors added so far, by name, for `checksums.verify`.
    """

    def __init__(self, folder: str | Path, max_shard_size: int = DEFAULT_SHARD_SIZE) -> None:
        if max_shard_size < 1:
            raise OutputError(f"max_shard_size must be at least 1 byte; got {max_shard_size}")
        self.folder, self.max_shard_size = Path(folder), max_shard_size
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._names: set[str] = set()
        self.checksums: dict[str, str] = {}
        self._closed = 0
        self._shard = _Shard()
        self._file = self._create()

    @classmethod
    def resume(cls, folder: str | Path, state: dict[str, Any]) -> "ShardWriter":
        """A writer that continues from a `state` that `commit` returned; later data is discarded.

        Raises OutputError if the folder no longer holds what was committed.
        """
        self = cls.__new__(cls)
        self.folder, self.max_shard_size = Path(folder), state["max_shard_size"]
        self._closed, self._shard = state["closed"], _Shard(**json.loads(json.dumps(state["shard"])))
        self.checksums = dict(state["checksums"])
        self._restore_partial_names()
        self._names = {*self._shard.entries, *self._shard.late}
        for number in range(1, self._closed + 1):
            self._names.update(read_header(self._partial(number)))
        self._file = self._reopen()
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of any shape, dtype and device. Its memory is free for reuse when this returns."""
        tensor = tensor.detach().cpu().contiguous()
        self._append(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, [as_bytes(tensor)])

    def copy(self, name: str, checkpoint: Checkpoint, source: str | None = None) -> None:
        """Append a tensor of a checkpoint, byte for byte. source: its name there, if that is not `name`."""
        info = checkpoint.info(source or name)
        self._append(name, info.dtype_name, info.shape, info.nbytes, checkpoint.chunks(source or name))

    @property
    def names(self) -> Set[str]:
        """The names of the tensors that were added."""
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor that was added."""
        shard = self._shard
        if name in shard.late:
            return _tensor(shard.late[name], base64.b64decode(shard.late[name]["data"]))
        if name in shard.entries:
            start, stop = shard.entries[name]["data_offsets"]
            data = os.pread(self._file, stop - start, 8 + _HEADER_ROOM + start)
            return _tensor(shard.entries[name], data)
        headers = (read_header(self._partial(number)) for number in range(1, self._closed + 1))
        info = next(header[name] for header in headers if name in header)
        return Checkpoint(self.folder, {}, {name: info}).read(name)

    def commit(self) -> tuple[dict[str, Any], Callable[[], None]]:
        """The state for `resume`, as JSON-serialisable values, and a function that makes it durable.

        Use the state only once that function has returned. It may run in another thread while more is added.
        """
        state = {
            "max_shard_size": self.max_shard_size, "closed": self._closed, "shard": asdict(self._shard),
            "checksums": dict(self.checksums),
        }  # fmt: skip
        file = os.dup(self._file)  # this shard may be closed by then

        def sync() -> None:
            try:
                with writing_to(self.folder):
                    os.fsync(file)
            finally:
                os.close(file)

        return state, sync

    def finish(self) -> dict[str, str]:
        """Close the last shard, rename all shards to their final names, write the index; returns the weight map.

        A single shard is `model.safetensors`, without an index. The folder becomes a checkpoint with its config.json,
        which the caller writes last.
        """
        self._close_shard()
        weight_map, size = {}, 0
        for number in range(1, self._closed + 1):
            final = _final_name(number, self._closed)
            header = read_header(self._partial(number))
            weight_map.update(dict.fromkeys(header, final))
            size += sum(info.nbytes for info in header.values())
            self._partial(number).rename(self.folder / final)
        sync_folder(self.folder)
        if self._closed > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            write_atomically(self.folder / "model.safetensors.index.json", text.encode())
        return weight_map

    def close(self) -> None:
        """Close the file without finishing. What was committed can be resumed."""
        os.close(self._file)

    def _append(
        self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int, parts: Iterable[memoryview]
    ) -> None:
        if name in self._names:
            raise ValueError(f"{name} was added before")
        # Offsets of 14 digits, more than any shard needs: the space reserved must not depend on them.
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [10**13, 10**13]}
        cost = len(json.dumps({name: entry}))
        self._make_room(nbytes, cost)
        shard, parts = self._shard, self._with_checksum(name, checksum(dtype, shape), parts)
        self._names.add(name)
        shard.room -= cost
        if nbytes % _ALIGNMENT:
            shard.late[name] = entry | {"data": base64.b64encode(b"".join(map(bytes, parts))).decode()}
            shard.late_size += nbytes
        else:
            self._write(name, entry, parts)

    def _with_checksum(self, name: str, crc: int, parts: Iterable[memoryview]) -> Iterator[memoryview]:
        """The parts unchanged; records the tensor's checksum once the last part has been taken."""
        for part in parts:
            crc = zlib.crc32(part, crc)
            yield part
        self.checksums[name] = f"{crc:08x}"

    def _write(self, name: str, entry: dict[str, Any], parts: Iterable[memoryview]) -> None:
        """Append a tensor's data to the current shard, and its entry to the header."""
        start = self._shard.size
        for part in parts:
            with writing_to(self.folder):
                _write_all(self._file, part)
            self._shard.size += len(part)
        self._shard.entries[name] = entry | {"data_offsets": [start, self._shard.size]}

    def _make_room(self, nbytes: int, cost: int) -> None:
        """Start a new shard if the current one has no room for so many bytes of data, or of header."""
        shard = self._shard
        is_full = shard.size + shard.late_size + nbytes > self.max_shard_size or cost > shard.room
        if is_full and (shard.entries or shard.late):
            self._close_shard()
            self._shard = _Shard()
            self._file = self._create()

    def _close_shard(self) -> None:
        """Append the late tensors, widest elements first so that all are aligned, and fill in the header."""
        late = sorted(self._shard.late.items(), key=lambda item: (-BITS[item[1]["dtype"]], item[0]))
        for name, entry in late:
            data = base64.b64decode(entry.pop("data"))
            self._write(name, entry, [memoryview(data)])
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shard.entries}, separators=(",", ":"))
        with writing_to(self.folder):
            os.pwrite(self._file, header.encode().ljust(_HEADER_ROOM), 8)
            os.fsync(self._file)
            os.close(self._file)
        self._closed += 1

    def _partial(self, number: int) -> Path:
        return self.folder / _PARTIAL.format(number)

    def _create(self) -> int:
        with writing_to(self.folder):
            file = os.open(self._partial(self._closed + 1), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            _write_all(file, memoryview(struct.pack("<Q", _HEADER_ROOM) + b" " * _HEADER_ROOM))
        return file

    def _reopen(self) -> int:
        """The current shard, truncated to its committed length, ready to append to. Later shards are deleted."""
        current = self._partial(self._closed + 1)
        length = 8 + _HEADER_ROOM + self._shard.size
        if not current.is_file() or current.stat().st_size < length:
            raise OutputError(f"{current} does not hold the {length:,} bytes that were committed: start anew")
        for later in self.folder.glob(".model-*.safetensors.partial"):
            if later > current:
                later.unlink()
        file = os.open(current, os.O_RDWR)
        os.ftruncate(file, length)
        os.lseek(file, 0, os.SEEK_END)
        return file

    def _restore_partial_names(self) -> None:
        """Undo the renames of an interrupted `finish`."""
        for file in [*self.folder.glob("model-*-of-*.safetensors"), *self.folder.glob("model.safetensors")]:
            file.rename(self._partial(int(file.name.split("-")[1]) if "-" in file.name else 1))


def _final_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _tensor(entry: dict[str, Any], data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _write_all(file: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(file, data[done:])
