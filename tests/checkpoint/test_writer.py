"""What is written reads back bit for bit, in the safetensors library too, interrupted or not."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlinear.checkpoint.output_dir import clear, require_empty, require_space, write_atomically
from qlinear.checkpoint.reader import Checkpoint
from qlinear.checkpoint.writer import ShardWriter
from qlinear.errors import OutputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.uint8]
DTYPES += [torch.bool, torch.float8_e4m3fn]


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def committed(writer: ShardWriter) -> dict[str, Any]:
    state, sync = writer.commit()
    sync()
    return state


@st.composite
def many_tensors(draw: st.DrawFn) -> list[tuple[str, torch.Tensor]]:
    kinds = st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES))
    drawn = draw(st.lists(kinds, min_size=1, max_size=12))
    return [(f"t{i}", random_tensor(shape, dtype, i)) for i, (shape, dtype) in enumerate(drawn)]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and (
        not a.numel() or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder: Path, tensors: list[tuple[str, torch.Tensor]], limit: int) -> None:
    writer = ShardWriter(folder, limit)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.finish()


@settings(deadline=None, max_examples=60)
@given(many_tensors(), st.integers(1, 600))
def test_any_tensors_read_back_bit_for_bit(tensors: list[tuple[str, torch.Tensor]], limit: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, tensors, limit)
        write_atomically(folder / "config.json", b"{}")
        loaded = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
        ours = Checkpoint.open(folder)
        assert set(loaded) == set(ours.tensors) == {name for name, _ in tensors}
        assert all(equal(loaded[name], tensor) and equal(ours.read(name), tensor) for name, tensor in tensors)
        sizes = [sum(i.nbytes for i in ours.tensors.values() if i.file.name == f) for f in files(folder)]
        assert max(sizes) <= max(limit, *(t.nbytes for _, t in tensors))
        assert not list(folder.glob(".*"))


@settings(deadline=None, max_examples=60)
@given(many_tensors(), st.integers(1, 600), st.data())
def test_a_resumed_writer_gives_the_same_bytes(
    tensors: list[tuple[str, torch.Tensor]], limit: int, data: st.DataObject
) -> None:
    commit_at = data.draw(st.integers(0, len(tensors)))
    lost = data.draw(st.integers(commit_at, len(tensors)))
    finished = lost == len(tensors) and data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as temporary:
        straight, resumed = Path(temporary, "straight"), Path(temporary, "resumed")
        write(straight, tensors, limit)
        writer = ShardWriter(resumed, limit)
        for name, tensor in tensors[:commit_at]:
            writer.add(name, tensor)
        state = json.dumps(committed(writer))
        for name, tensor in tensors[commit_at:lost]:
            writer.add(name, tensor)
        if finished:
            writer.finish()
        else:
            writer.close()
        writer = ShardWriter.resume(resumed, json.loads(state))
        for name, tensor in tensors[commit_at:]:
            writer.add(name, tensor)
        writer.finish()
        assert files(resumed) == files(straight)


def test_resuming_without_the_committed_bytes_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("x", torch.ones(64))
    state = committed(writer)
    writer.close()
    with (tmp_path / ".model-00001.safetensors.partial").open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(OutputError, match="committed"):
        ShardWriter.resume(tmp_path, state)


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 100)
    for i in range(4):
        writer.add(f"t{i}", torch.ones(20))
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    writer.close()


def test_the_index_names_every_tensor_and_their_size(tmp_path: Path) -> None:
    write(tmp_path, [(f"t{i}", torch.full((10,), float(i))) for i in range(5)], 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert set(index["weight_map"]) == {f"t{i}" for i in range(5)}
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}


def test_a_full_header_starts_a_new_shard(tmp_path: Path) -> None:
    names = [f"{i:04d}" + "x" * 1000 for i in range(300)]
    write(tmp_path, [(name, torch.ones(2)) for name in names], 10**9)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    write_atomically(tmp_path / "config.json", b"{}")
    assert set(Checkpoint.open(tmp_path).tensors) == set(names)


def test_a_copied_tensor_has_the_bytes_of_its_source(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tensors = {"a": torch.randn(100, 7), "b": torch.tensor([3], dtype=torch.int8)}
    save_file(tensors, source / "model.safetensors")
    writer = ShardWriter(out)
    writer.copy("a", Checkpoint.open(source))
    writer.copy("renamed", Checkpoint.open(source), "b")
    writer.finish()
    loaded = load_file(out / "model.safetensors")
    assert torch.equal(loaded["a"], tensors["a"])
    assert torch.equal(loaded["renamed"], tensors["b"])


def test_a_name_added_twice_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("x", torch.ones(1))
    with pytest.raises(ValueError, match="x was added before"):
        writer.add("x", torch.ones(1))
    writer.close()


def test_strided_tensors_are_written_in_row_major_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    write(tmp_path, [("x", tensor)], 10**9)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], tensor)


def test_output_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    require_empty(tmp_path / "new")
    require_empty(tmp_path)
    with pytest.raises(OutputError, match="source itself"):
        require_empty(tmp_path, overwrite=True, source=tmp_path / "." / "x" / "..")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty: choose another, or pass --overwrite"):
        require_empty(tmp_path)
    with pytest.raises(OutputError, match="holds no checkpoint"):
        require_empty(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        require_empty(tmp_path / "thesis.txt")


def test_clearing_deletes_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, [("x", torch.ones(2))], 100)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model.safetensors").write_text("mine")
    require_empty(tmp_path, overwrite=True)
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.safetensors", "runs", "thesis.txt"]


def test_too_little_disk_is_said_in_gigabytes(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"needs 1000000000\.00 GB"):
        require_space(tmp_path, 10**18)


def test_an_interrupted_atomic_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "config.json"
    write_atomically(target, b"old")

    def power_cut(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.fsync", power_cut)
    with pytest.raises(OutputError, match="power cut"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"


def test_a_full_disk_is_named_and_what_was_committed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(8))
    state = committed(writer)

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OutputError, match=r"cannot be written to .No space left"):
            writer.add("b", torch.ones(8))
    writer.close()
    resumed = ShardWriter.resume(tmp_path, state)
    resumed.add("b", torch.zeros(8))
    resumed.finish()
    assert set(load_file(tmp_path / "model.safetensors")) == {"a", "b"}
