"""What a disk, a source or a person can do to a run: one line is said, and what was finished is taken up again."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import qlinear
from qlinear import QLinearError
from qlinear.checkpoint import writer

from ..support.models import contents, save_model

IDS = torch.arange(3, 45).reshape(3, 14)
BLOCKS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(source, out)
    return contents(out)


def quantize(source: Path, out: Path, at_block: int = -1, act: Callable[[], Any] = lambda: None) -> None:
    """Quantize, and `act` when the block of that number is due."""

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing", at_block):
            act()

    qlinear.quantize(source, out, calibration=IDS, progress=progress)


def goes_on(source: Path, out: Path, whole: dict[str, bytes], finished: int) -> None:
    """Started again, the run takes up so many finished blocks, and gives the bytes of an undisturbed one."""
    assert not (out / "config.json").exists()
    smoothings = list((out / ".qlinear").glob("block-*.safetensors"))
    assert len(smoothings) >= finished
    quantize(source, out)
    assert contents(out) == whole


def says_one_line(caught: pytest.ExceptionInfo[Any]) -> None:
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as stream:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    stream.write(bytes(size))


@pytest.mark.parametrize("block", [1, BLOCKS])
def test_a_disk_that_somebody_fills_meanwhile(
    source: Path, whole: dict[str, bytes], small_disk: Path, block: int
) -> None:
    with pytest.raises(QLinearError, match=r"No space left on device\): mend that and run again") as caught:
        quantize(source, small_disk / "out", block, lambda: fill(small_disk))
    says_one_line(caught)
    (small_disk / "ballast").unlink()
    goes_on(source, small_disk / "out", whole, block)


@pytest.mark.parametrize("number", [0, 3, 20, 40])
def test_a_disk_that_is_full_at_any_write(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    count, write_all = iter(range(number, -1, -1)), writer._write_all

    def write(file: int, data: memoryview) -> None:
        if next(count, -1) <= 0:
            os.write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, data)

    monkeypatch.setattr(writer, "_write_all", write)
    with pytest.raises(QLinearError, match="No space left on device") as caught:
        quantize(source, tmp_path / "out")
    says_one_line(caught)
    monkeypatch.undo()
    goes_on(source, tmp_path / "out", whole, 0)


def test_a_source_that_is_cut_meanwhile(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    shard = source / "model.safetensors"
    sound = shard.read_bytes()
    try:
        with pytest.raises(QLinearError, match="while it was read: it was changed") as caught:
            quantize(source, tmp_path / "out", 1, lambda: shard.write_bytes(sound[: len(sound) // 4]))
        says_one_line(caught)
        with pytest.raises(QLinearError, match="is truncated"):
            quantize(source, tmp_path / "out")
    finally:
        shard.write_bytes(sound)
    goes_on(source, tmp_path / "out", whole, 1)


def test_a_source_that_goes_away_meanwhile(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    shard, aside = source / "model.safetensors", source / "aside"
    try:
        with pytest.raises(QLinearError, match=r"cannot be read \(No such file") as caught:
            quantize(source, tmp_path / "out", 2, lambda: shard.rename(aside))
        says_one_line(caught)
    finally:
        aside.rename(shard)
    goes_on(source, tmp_path / "out", whole, 2)


def test_a_disk_that_cannot_be_read(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(QLinearError, match=r"cannot be read .*check the disk") as caught:
        quantize(source, tmp_path / "out", 1, lambda: monkeypatch.setattr(os, "preadv", broken))
    says_one_line(caught)
    monkeypatch.undo()
    goes_on(source, tmp_path / "out", whole, 1)


@pytest.mark.parametrize("block", [0, 2])
def test_ctrl_c(source: Path, whole: dict[str, bytes], tmp_path: Path, block: int) -> None:
    # A process that was started in the background ignores the signal, and so do its children, these tests among them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", block, lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    goes_on(source, tmp_path / "out", whole, block)
