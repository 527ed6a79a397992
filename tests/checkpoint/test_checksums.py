"""Checksums detect every change to a finished folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qlinear
from qlinear.checkpoint.checksums import verify
from qlinear.checkpoint.reader import Checkpoint
from qlinear.checkpoint.writer import ShardWriter
from qlinear.errors import CheckpointError

from ..support.models import save_model, save_tokenizer

IDS = torch.arange(3, 45).reshape(3, 14)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tokenizer(save_model(folder / "source", "llama"))
    qlinear.quantize(folder / "source", folder / "out", calibration=IDS, max_shard_size=8000)
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_what_was_just_written_is_whole(out: Path) -> None:
    verified = verify(out)
    assert verified.tensors == len(Checkpoint.open(out).tensors)
    assert verified.files >= 2
    assert len(shards(out)) > 2


@pytest.mark.parametrize("position", [0, 17, -1])
def test_every_changed_bit_of_a_tensor_is_found(out: Path, position: int) -> None:
    shard = shards(out)[1]
    with safe_open(shard, "pt") as opened:
        name = max(opened.keys(), key=lambda n: opened.get_tensor(n).numel())
    info = Checkpoint.open(out).info(name)
    data = bytearray(shard.read_bytes())
    data[(info.start if position >= 0 else info.stop) + position] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} in {shard.name} has changed") as caught:
        verify(out)
    assert "\n" not in str(caught.value)


def rewritten(shard: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})


def test_a_tensor_of_the_same_bytes_in_another_shape_has_changed(out: Path) -> None:
    name = next(n for n, info in Checkpoint.open(out).tensors.items() if len(info.shape) == 2)
    rewritten(
        Checkpoint.open(out).info(name).file,
        lambda tensors: tensors.update({name: tensors[name].reshape(-1)}),
    )
    with pytest.raises(CheckpointError, match=f"{name} in .* has changed"):
        verify(out)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda out: shards(out)[0].unlink(), "model-00001-of-.* is missing"),
    "a shard is truncated": (
        lambda out: shards(out)[1].write_bytes(shards(out)[1].read_bytes()[:-5]),
        "model-00002-of-.* is truncated",
    ),
    "the index is missing": (
        lambda out: (out / "model.safetensors.index.json").unlink(), "neither model.safetensors nor an index",
    ),
    "the tokenizer has changed": (
        lambda out: (out / "tokenizer.json").write_text("{}"), "tokenizer.json has changed",
    ),
    "the tokenizer is missing": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "config.json has changed": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text() + " "),
        "config.json has changed",
    ),
    "config.json is missing": (lambda out: (out / "config.json").unlink(), "no config.json"),
    "qlinear.json is missing": (lambda out: (out / "qlinear.json").unlink(), "no checksums"),
    "the run was not finished": (lambda out: (out / ".qlinear").mkdir(), "not finished"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(out: Path, damage: str) -> None:
    spoil, complaint = DAMAGES[damage]
    spoil(out)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        verify(out)
    assert "\n" not in str(caught.value)


def test_many_damages_are_counted(out: Path) -> None:
    note = json.loads((out / "qlinear.json").read_text())
    sums = note["checksums"]["tensors"]
    note["checksums"]["tensors"] = dict.fromkeys(sums, "00000000")
    (out / "qlinear.json").write_text(json.dumps(note))
    with pytest.raises(CheckpointError, match=f"and {len(sums) - 3} more"):
        verify(out)


def test_a_converted_folder_verifies_itself(made: Path, tmp_path: Path) -> None:
    qlinear.convert(made, tmp_path / "converted", "qlinear")
    assert verify(tmp_path / "converted").tensors > 0


def test_checksums_go_on_where_a_writer_was_interrupted(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.arange(i * 3 + 1).to(torch.int8 if i % 2 else torch.float32) for i in range(9)}
    whole, halves = ShardWriter(tmp_path / "whole", 64), ShardWriter(tmp_path / "halves", 64)
    for i, (name, tensor) in enumerate(tensors.items()):
        whole.add(name, tensor)
        if i == 4:
            state, sync = halves.commit()
            sync()
            halves.add("lost", torch.ones(3))
            halves.close()
            halves = ShardWriter.resume(tmp_path / "halves", state)
        halves.add(name, tensor)
    assert halves.checksums == whole.checksums
    assert halves.checksums.keys() == tensors.keys()
