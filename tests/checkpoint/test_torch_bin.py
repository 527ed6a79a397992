"""A damaged torch.save file is refused in one line that names it, whatever the damage."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear.calibration.stats_file import load_statistics
from qlinear.checkpoint.reader import Checkpoint
from qlinear.checkpoint.torch_bin import read_pickled
from qlinear.errors import CheckpointError, DataError

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def saved(tensors: object = TENSORS, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


WHOLE = [saved(), saved(legacy=True)]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file cut short, with some bytes changed, or of bytes that never were one."""
    whole = draw(st.sampled_from(WHOLE))
    kind = draw(st.sampled_from(["cut", "changed", "noise"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "noise":
        return draw(st.sampled_from([b"", b"\x80\x02"])) + draw(st.binary(max_size=60))
    data = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=16)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickled")


# torch warns of what it takes for another version's pickle.
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=400, deadline=None)
@given(data=damaged())
def test_damage_is_named_in_one_line_or_does_no_harm(data: bytes, folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(data)
    refused, tensors = "", {}
    try:
        tensors = read_pickled(file)
    except CheckpointError as error:
        refused = str(error)
    assert all(0 <= info.start <= info.stop <= info.file.stat().st_size for info in tensors.values())
    assert not refused or str(file) in refused
    assert "\n" not in refused


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None)
@given(data=damaged())
def test_damaged_statistics_are_named_in_one_line(data: bytes, folder: Path) -> None:
    file = folder / "stats.pth"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"stats\.pth") as caught:
        load_statistics(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[torch.ones(2)], {1: torch.ones(2)}, torch.ones(2), "text"])
def test_what_is_no_table_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(saved(content))
    with pytest.raises(CheckpointError, match="no tensors by name"):
        Checkpoint.open(tmp_path)
