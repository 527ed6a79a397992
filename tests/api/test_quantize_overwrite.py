"""`overwrite` keeps the old checkpoint until the new one is whole, whatever happens in between."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qlinear
from qlinear import QLinearError
from qlinear.checkpoint.checksums import verify

from ..support.dying import killed
from ..support.models import contents, edit_weights, save_model

IDS = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"calibration": IDS, "dtype": "float32"}
OTHER = QUICK | {"scheme": "w8a16", "algorithm": "gptq"}


def old_result(folder: Path) -> tuple[Path, Path]:
    """A source and a checkpoint that was made from it, with a file of the user's beside it."""
    source, out = save_model(folder / "source"), folder / "out"
    qlinear.quantize(source, out, **QUICK)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("keep me")
    return source, out


def without_journal(out: Path) -> dict[str, bytes]:
    """The files of a result; a run that was killed after the new checkpoint was in its place leaves its journal."""
    return {name: data for name, data in contents(out).items() if not name.startswith(".qlinear")}


def hidden_beside(out: Path) -> list[str]:
    return [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("tensors", [False, True], ids=["between files", "within a tensor"])
def test_a_job_that_is_killed_anywhere_leaves_a_checkpoint_that_verifies(
    tmp_path: Path, tensors: bool
) -> None:
    source, out = old_result(tmp_path)
    old = contents(out)
    qlinear.quantize(source, tmp_path / "expected", **OTHER)
    expected = contents(tmp_path / "expected") | {"notes/mine.txt": old["notes/mine.txt"]}
    step = 0
    while killed(source, out, step, OTHER | {"overwrite": True, "resume": False}, tensors):
        assert verify(out).tensors
        assert without_journal(out) in (old, expected)
        step += 3 if tensors else 1
    assert step > 3
    assert contents(out) == expected
    assert not hidden_beside(out)


def test_an_unfinished_run_beside_the_old_checkpoint_is_resumed(tmp_path: Path) -> None:
    source, out = old_result(tmp_path)
    assert killed(source, out, 6, OTHER | {"overwrite": True}, False)
    assert hidden_beside(out)
    seen: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "checking weights":
            seen.append(done)

    qlinear.quantize(source, out, overwrite=True, progress=progress, **OTHER)
    assert not seen, "a run that is resumed does not check the weights again"
    qlinear.quantize(source, tmp_path / "expected", **OTHER)
    assert contents(out) == contents(tmp_path / "expected") | {"notes/mine.txt": b"keep me"}


def test_a_model_that_turns_out_unfit_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    source, out = old_result(tmp_path)
    old = contents(out)

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan

    edit_weights(source, spoil)
    with pytest.raises(QLinearError, match="NaN"):
        qlinear.quantize(source, out, overwrite=True, **QUICK)
    assert contents(out) == old
    assert not hidden_beside(out)


def test_convert_replaces_a_checkpoint_in_one_step(tmp_path: Path) -> None:
    source, out = old_result(tmp_path)
    qlinear.quantize(source, tmp_path / "other", **QUICK)
    qlinear.convert(tmp_path / "other", out, format="lmdeploy", overwrite=True)
    assert (out / "notes" / "mine.txt").read_text() == "keep me"
    assert verify(out).tensors
    assert not hidden_beside(out)
