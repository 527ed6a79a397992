"""A model that transformers itself cannot run is refused in one line; qlinear's own failures are not blamed on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import qlinear
from qlinear.api.calibrate import write_statistics
from qlinear.checkpoint.reader import Checkpoint
from qlinear.cli.commands import app
from qlinear.errors import QLinearError, StructureError
from qlinear.streaming.diagnose import diagnosing
from qlinear.streaming.streamed_model import StreamedModel

from ..support.models import contents, save_model

# Rotary embeddings turn pairs of channels: five of them GPT-J's config takes, and its forward does not.
ODD = {"n_embd": 30, "n_head": 2, "n_layer": 2, "rotary_dim": 5}
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("unfit"), "gptj", **ODD)


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda model, out: qlinear.quantize(model, out, calibration=IDS),
    "smooth off": lambda model, out: qlinear.quantize(model, out, smooth="off"),
    "smooth alone": lambda model, out: qlinear.quantize(model, out, "none", calibration=IDS),
    "ignore": lambda model, out: qlinear.quantize(model, out, calibration=IDS, ignore=["*q_proj"]),
    "plan": lambda model, out: qlinear.quantize(model, out, calibration=IDS, plan=True),
    "calibrate": lambda model, out: write_statistics(model, out.with_suffix(".pth"), calibration=IDS),
    "evaluate": lambda model, out: qlinear.evaluate(model, data=IDS),
    "inspect": lambda model, out: qlinear.inspect(model),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_cannot_be_run_is_refused_and_nothing_is_written(
    command: str, unfit: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        StructureError, match=r"GPTJForCausalLM raises RuntimeError in transformer\.h\.0"
    ) as e:
        COMMANDS[command](unfit, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert contents(tmp_path) == {}


def test_the_command_line_exits_as_for_any_mistake(unfit: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(unfit), str(tmp_path / "out"), "--quiet"])
    assert isinstance(done.exception, QLinearError)  # which `main` says in a line, and exits with 2


def test_what_fails_around_a_model_that_runs_is_no_fault_of_the_model(tmp_path: Path) -> None:
    source = StreamedModel(Checkpoint.open(save_model(tmp_path)))
    with pytest.raises(RuntimeError, match="ours"), diagnosing(lambda: (source.model, source.blocks)):
        raise RuntimeError("ours")
    with pytest.raises(ZeroDivisionError), source.lanes([{"input_ids": IDS, "use_cache": False}]):
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.parametrize("limit", [{"max_position_embeddings": 5}, {"vocab_size": 20, "bos_token_id": 1}])
def test_models_of_few_positions_or_tokens_are_planned_and_sketched(
    limit: dict[str, int], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "m", "opt", ffn_dim=45, word_embed_proj_dim=30, **limit)
    assert all(linear.group for linear in qlinear.inspect(folder).linears if linear.scheme)
    assert qlinear.quantize(folder, tmp_path / "out", smooth="off").layers
