"""A run that is killed at any moment, and started again, gives the bytes of one that was left alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qlinear
from qlinear import QLinearError

from ..support.dying import killed
from ..support.models import contents, edit_weights, save_model

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 45).reshape(3, 14)
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-no-data": {"smooth": "off"},
    "llama-gptq": {"algorithm": "gptq", "scheme": "w8a8", "smooth": "auto"},
    "llama-refined": {"refine": 1, "scheme": "w4a16-channel"},
    "llama-kept": {"format": "qlinear", "migration_scale": "always", "propagate": True},
    "llama-float": {"scheme": "none", "format": "qlinear", "migration_scale": "always"},
    "qwen3_moe": {"algorithm": "awq"},
    "gemma3_text": {
        "scheme": "w8a8-static",
        "max_shard_size": 9000,
        "propagate": True,
        "dtype": "bfloat16",
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gemma3_text": {"num_attention_heads": 2, "tie_word_embeddings": True, "dtype": torch.bfloat16},
}


def options_of(case: str) -> dict[str, Any]:
    return {"calibration": IDS, **OPTIONS[case]}


@pytest.fixture(scope="module", params=OPTIONS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A case, its source, and what an undisturbed run made of it."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param.split("-")[0]
    source = save_model(
        folder / "source",
        kind,
        num_hidden_layers=3 if request.param == "llama" else 2,
        **MODELS.get(kind, {}),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that will be killed has it
    try:
        qlinear.quantize(source, folder / "whole", **options_of(request.param))
    finally:
        torch.set_num_threads(threads)
    return request.param, source, folder / "whole"


@pytest.fixture
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_killed_at_every_step_it_goes_on_and_gives_the_same_bytes(
    case: tuple[str, Path, Path], tmp_path: Path
) -> None:
    name, source, whole = case
    step = 0
    while killed(source, tmp_path / "out", step, options_of(name)):
        assert not (tmp_path / "out" / "config.json").exists() or step > 9
        qlinear.quantize(source, tmp_path / "out", **options_of(name))
        assert contents(tmp_path / "out") == contents(whole), f"killed at step {step}"
        shutil.rmtree(tmp_path / "out")
        step += 1
    assert step > 3
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("step", [0, 9, 17])
def test_killed_in_the_middle_of_a_tensor_and_again_later(
    case: tuple[str, Path, Path], tmp_path: Path, step: int
) -> None:
    name, source, whole = case
    killed(source, tmp_path / "out", step, options_of(name), tensors=True)
    killed(source, tmp_path / "out", 7, options_of(name), tensors=True)
    if not (tmp_path / "out" / "config.json").exists():
        qlinear.quantize(source, tmp_path / "out", **options_of(name))
    assert contents(tmp_path / "out") == contents(whole)


def half_done(source: Path, out: Path, **options: Any) -> None:
    assert killed(source, out, 4, {"calibration": IDS, **options})
    assert (out / ".qlinear" / "journal.json").is_file()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def test_other_settings_are_named_and_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    half_done(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(QLinearError, match=r"smooth was 0\.5 and is now 0\.7.*--no-resume"):
        qlinear.quantize(source, tmp_path / "out", calibration=IDS, smooth=0.7)
    with pytest.raises(QLinearError, match="calibration was"):
        qlinear.quantize(source, tmp_path / "out", calibration=IDS + 1)
    assert contents(tmp_path / "out") == before


def test_another_source_is_not_mistaken_for_the_first(source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    half_done(source, tmp_path / "out")
    edit_weights(other, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(QLinearError, match="model was"):
        qlinear.quantize(other, tmp_path / "out", calibration=IDS)


def test_no_resume_starts_anew(source: Path, tmp_path: Path) -> None:
    half_done(source, tmp_path / "out")
    qlinear.quantize(source, tmp_path / "out", calibration=IDS, smooth=0.7, resume=False)
    qlinear.quantize(source, tmp_path / "fresh", calibration=IDS, smooth=0.7)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_second_run_into_the_same_folder_is_refused(source: Path, tmp_path: Path) -> None:
    refused = []

    def second(stage: str, done: int, total: int) -> None:
        if stage == "quantizing" and done == 1 and not refused:
            for options in ({}, {"resume": False}):
                with pytest.raises(QLinearError, match="another run is writing"):
                    qlinear.quantize(source, tmp_path / "out", calibration=IDS, **options)
                refused.append(options)

    qlinear.quantize(source, tmp_path / "out", calibration=IDS, progress=second)
    assert len(refused) == 2
    qlinear.quantize(source, tmp_path / "alone", calibration=IDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_shard_that_was_cut_meanwhile_is_named(source: Path, tmp_path: Path) -> None:
    half_done(source, tmp_path / "out")
    shard = next((tmp_path / "out").glob(".model-*.partial"))
    shard.write_bytes(shard.read_bytes()[: 100 << 10])
    with pytest.raises(QLinearError, match=r"does not hold the .* committed"):
        qlinear.quantize(source, tmp_path / "out", calibration=IDS)
