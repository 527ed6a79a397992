"""`qlinear calibrate` and `qlinear inspect --migration-scale`: what they print, and how mistakes end."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlinear.calibration.stats_file import load_statistics
from qlinear.cli.commands import main

from ..support.models import save_model

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--calibration", "random", "--samples", "2", "--seq-len", "8")
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 12}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlinear", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        assert isinstance(exit.value.code, int)
        return exit.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("name", ["stats.safetensors", "inputs_stats.pth"])
def test_calibrate_writes_the_file_and_says_what_it_measured(name: str, run: Run, tmp_path: Path) -> None:
    model, file = save_model(tmp_path / "model"), tmp_path / name
    code, out, err = run("calibrate", model, file, *QUICK, "--json", "--quiet")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert set(told) == {"out", "seconds", "tokens", "modules", "idle"}
    assert (told["out"], told["tokens"], told["idle"]) == (str(file), 16, [])
    assert set(told["modules"]) == set(load_statistics(file).inputs)
    assert len(told["modules"]) == 2 * 7


def test_experts_without_a_token_are_named_for_a_person(run: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mixtral", **EXPERTS)
    few = ("--calibration", "random", "--samples", "1", "--seq-len", "4")
    code, out, err = run("calibrate", model, tmp_path / "stats.safetensors", *few)
    assert code == 0
    assert "inputs measured" in out
    assert "calibrating: 2/2" in err
    idle = load_statistics(tmp_path / "stats.safetensors").idle
    assert idle
    assert all(name in "".join(out.split("\n")).replace(" ", "") for name in idle)


def test_mistakes_are_one_line_and_leave_the_file_as_it_was(run: Run, tmp_path: Path) -> None:
    model, file = save_model(tmp_path / "model"), tmp_path / "stats.safetensors"
    file.write_text("mine")
    for arguments, complaint in (
        ((model, file), "--overwrite"),
        ((model, tmp_path / "stats.json"), "safetensors"),
        ((model, tmp_path / "no" / "stats.pth"), "no folder"),
        ((tmp_path / "nothing", tmp_path / "stats.pth"), "nothing"),
    ):
        code, out, err = run("calibrate", *arguments, *QUICK, "--quiet")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("qlinear: ")
        assert complaint in err
    assert file.read_text() == "mine"
    assert run("calibrate", model, file, *QUICK, "--quiet", "--overwrite")[0] == 0
    assert load_statistics(file).inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bytes(dtype: str, run: Run, tmp_path: Path) -> None:
    model, options = save_model(tmp_path / "model", dtype=torch.bfloat16), ("--seed", "3", "--dtype", dtype)
    for name in ("a.safetensors", "b.safetensors"):
        assert run("calibrate", model, tmp_path / name, *QUICK, "--quiet", *options)[0] == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_inspect_plans_for_a_layout_and_its_vectors(run: Run, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    code, out, err = run("inspect", model, "--format", "lmdeploy", "--migration-scale", "always", "--json")
    assert (code, err) == (0, "")
    linears = json.loads(out)["linears"]
    assert [linear["migration"] for linear in linears].count("kept") == 2 * 7
    code, out, err = run("inspect", model, "--migration-scale", "always")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "needs a format that holds it" in err
