"""The command line: what bad input gets is one line and exit code 2, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import qlinear
from qlinear.cli.commands import main

from ..support.models import contents, edit_config, edit_weights, save_model, save_tokenizer

QUICK = ("--calibration", "random", "--samples", "2", "--seq-len", "8", "--quiet")
UP = "model.layers.1.mlp.up_proj.weight"


class Ran(NamedTuple):
    code: int | None
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["qlinear", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code is None or isinstance(exit.value.code, int)
        return Ran(exit.value.code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("pristine"))
    save_tokenizer(folder)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A sound checkpoint to spoil."""
    return shutil.copytree(pristine, tmp_path / "model")


def is_refused(ran: Ran, *complaints: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("qlinear: ")
    assert ran.err.count("\n") == 1
    for complaint in complaints:
        assert complaint in ran.err


# --- models that cannot be used ---


def no_folder(model: Path) -> None:
    shutil.rmtree(model)


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("weights")


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 5)


def missing_shard(model: Path) -> None:
    shutil.rmtree(model)
    save_model(model, shard="10KB")
    min(model.glob("model-*.safetensors")).unlink()


def escaping_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {UP: "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def wrong_shape(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({UP: torch.zeros(5, 7)}))


def missing_tensor(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.__delitem__(UP))


def already_quantized(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "awq"})


def codes_without_a_word(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))


def unknown_architecture(model: Path) -> None:
    edit_config(model, model_type="zorg", architectures=["ZorgForCausalLM"])


def remote_code(model: Path) -> None:
    edit_config(
        model, model_type="zorg", auto_map={"AutoConfig": "zorg.Config", "AutoModelForCausalLM": "zorg.Model"}
    )


def no_blocks(model: Path) -> None:
    edit_config(model, num_hidden_layers=0)


UNUSABLE_MODELS = [
    (no_folder, "no such folder"),
    (a_file, "no such folder"),
    (no_config, "has no config.json"),
    (broken_config, "config.json is damaged"),
    (no_weights, "neither model.safetensors nor an index"),
    (truncated, "model.safetensors is truncated"),
    (missing_shard, "is missing, but model.safetensors.index.json names it"),
    (escaping_shard, "outside of its folder"),
    (wrong_shape, UP),
    (missing_tensor, UP),
    (already_quantized, "already quantized (quant_method 'awq')"),
    (codes_without_a_word, f"{UP} as I8"),
    (unknown_architecture, "zorg"),
    (remote_code, "trust"),
    (no_blocks, "no decoder blocks"),
]


@pytest.mark.parametrize(
    ("spoil", "complaint"), UNUSABLE_MODELS, ids=lambda case: getattr(case, "__name__", "")
)
def test_a_model_that_cannot_be_used_is_refused(
    run: Run, model: Path, tmp_path: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoil(model)
    is_refused(run("quantize", model, tmp_path / "out", *QUICK), complaint)
    assert not (tmp_path / "out").exists()


NUMBERS = [UP, "model.layers.0.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("name", [*NUMBERS, "lm_head.weight"])
@pytest.mark.parametrize("smooth", ["0.5", "off"])
def test_a_weight_that_is_no_number_is_named_and_counted(
    run: Run, model: Path, tmp_path: Path, name: str, smooth: str
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3:6] = torch.tensor([torch.nan, torch.inf, -torch.inf])

    edit_weights(model, spoil)
    ran = run("quantize", model, tmp_path / "out", *QUICK, "--smooth", smooth)
    is_refused(ran, f"{name} holds 3 NaN or infinite of ")
    assert not (tmp_path / "out").exists()


def test_a_bad_weight_is_found_before_an_old_result_is_deleted(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, out, *QUICK).code == 0
    before = contents(out)
    edit_weights(model, lambda tensors: tensors.update({UP: torch.full_like(tensors[UP], torch.nan)}))
    is_refused(run("quantize", model, out, *QUICK, "--overwrite"), UP)
    assert contents(out) == before


def overflowing(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e5
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e3


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_infinity_in_float16_stops_and_suggests_float32(
    run: Run, model: Path, tmp_path: Path, command: str
) -> None:
    edit_weights(model, overflowing)
    if command == "quantize":
        arguments: tuple[object, ...] = (model, tmp_path / "out", *QUICK)
    else:
        arguments = (model, "--data", "random", "--seq-len", "8", "--tokens", "16", "--quiet")
    is_refused(run(command, *arguments, "--dtype", "float16"), "infinity", "--dtype float32")
    assert not (tmp_path / "out").exists()
    assert run(command, *arguments, "--dtype", "float32").code == 0


# --- arguments that cannot be ---

BAD_ARGUMENTS = [
    (("--scheme", "w3a3"), ("scheme must be one of", "w8a8", "'w3a3'")),
    (("--smooth", "2"), ("smooth must be",)),
    (("--smooth", "nan"), ("smooth must be",)),
    (("--smooth", "lots"), ("smooth must be", "'lots'")),
    (("--dtype", "int8"), ("dtype must be one of float32, bfloat16, float16",)),
    (("--ignore", "no_such*"), ("'no_such*' matches no linear", "model.layers.0.self_attn.q_proj")),
    (("--ignore", "re:("), ("'re:(' is no regular expression",)),
    (("--ignore", "*"), ("leaves nothing to quantize",)),
    (("--max-shard-size", "5XB"), ("--max-shard-size must be",)),
    (("--max-shard-size", "0"), ("max_shard_size must be at least 1",)),
    (("--seq-len", "65"), ("seq_len 65 is longer than the model takes", "64")),
    (("--samples", "0"), ("'--samples'",)),
    (("--samples", "some"), ("'--samples'",)),
    (("--calibration", "no/such/file.txt"), ("no such file",)),
    (("--no-such-option",), ("No such option", "qlinear quantize --help")),
]


@pytest.mark.parametrize(("arguments", "complaints"), BAD_ARGUMENTS, ids=lambda case: " ".join(case))
def test_arguments_that_cannot_be_are_refused(
    run: Run, pristine: Path, tmp_path: Path, arguments: tuple[str, ...], complaints: tuple[str, ...]
) -> None:
    is_refused(run("quantize", pristine, tmp_path / "out", *QUICK, *arguments), *complaints)
    assert not (tmp_path / "out").exists()


def test_a_missing_argument_and_an_unknown_command_are_named(run: Run) -> None:
    is_refused(run("quantize", "demo"), "'out'")
    is_refused(run("quantise"), "quantise", "qlinear --help")


# --- text that cannot be used ---

TEXTS = [
    ("empty.txt", "", "holds no text"),
    ("blank.jsonl", '{"text": "  "}\n', "holds no text"),
    ("no_text.jsonl", '{"label": 1}\n', "no_text.jsonl, line 1"),
    ("not_json.jsonl", "w5 w6\n", "not JSON"),
    ("short.txt", "w5 w6", "fewer than seq_len 8"),
    ("table.csv", "w5", "unknown kind '.csv'"),
]


@pytest.mark.parametrize(("name", "text", "complaint"), TEXTS, ids=[name for name, *_ in TEXTS])
def test_text_that_cannot_be_used_is_refused(
    run: Run, pristine: Path, tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    (tmp_path / name).write_text(text)
    is_refused(
        run("quantize", pristine, tmp_path / "out", *QUICK, "--calibration", tmp_path / name), complaint
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate"])
def test_text_needs_a_tokenizer(run: Run, model: Path, tmp_path: Path, command: str) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text.txt").write_text("w5 " * 100)
    arguments = {
        "quantize": (tmp_path / "out", *QUICK, "--calibration", tmp_path / "text.txt"),
        "evaluate": ("--data", tmp_path / "text.txt", "--seq-len", "8"),
        "generate": ("w5 w6",),
    }
    is_refused(run(command, model, *arguments[command]), "tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_knows_more_words_than_the_model_is_refused(
    run: Run, model: Path, tmp_path: Path
) -> None:
    save_tokenizer(model, 200)
    (tmp_path / "text.txt").write_text("w5 w199 " * 100)
    ran = run("quantize", model, tmp_path / "out", *QUICK, "--calibration", tmp_path / "text.txt")
    is_refused(ran, "0 ... 96", "tokenizer")
    assert not (tmp_path / "out").exists()


# --- places that cannot be written to ---


def test_an_output_that_cannot_be_is_refused_and_untouched(run: Run, model: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    is_refused(run("quantize", model, full, *QUICK), "not empty")
    is_refused(run("quantize", model, full, *QUICK, "--overwrite"), "holds no checkpoint")
    is_refused(run("quantize", model, model, *QUICK), "the source itself")
    is_refused(run("quantize", model, model, *QUICK, "--overwrite"), "the source itself")
    is_refused(run("quantize", model, full / "thesis.txt", *QUICK), "is a file")
    is_refused(run("quantize", model, full / "thesis.txt" / "out", *QUICK), "cannot be written to")
    assert contents(tmp_path) == before


def test_too_small_a_disk_is_refused(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int = 10**9
        used: int = 10**9 - 1000
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    is_refused(run("quantize", pristine, tmp_path / "out", *QUICK), "are free")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_named(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, 0

    def filling(file: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 150_000:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", filling)
    ran = run("quantize", pristine, tmp_path / "out", *QUICK)
    monkeypatch.undo()
    is_refused(ran, str(tmp_path / "out"), "No space left on device")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_that_may_not_be_read_is_named(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("w5")
    read_text = Path.read_text

    def forbidden(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "text.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", forbidden)
    ran = run("quantize", pristine, tmp_path / "out", *QUICK, "--calibration", tmp_path / "text.txt")
    is_refused(ran, "Permission denied", "text.txt")


def test_ctrl_c_ends_it_with_one_line(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qlinear.algorithms.rtn, "round_to_nearest", interrupt)
    ran = run("quantize", pristine, tmp_path / "out", *QUICK)
    assert (ran.code, ran.out, ran.err.count("\n")) == (130, "", 1)
    assert not (tmp_path / "out" / "config.json").exists()


# --- the other commands ---


def test_evaluate_refuses_what_cannot_be_compared(run: Run, pristine: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", vocab_size=50)
    random = ("--data", "random", "--quiet")
    is_refused(run("evaluate", pristine, "--reference", other, *random), "97 and 50 tokens")
    is_refused(run("evaluate", pristine, "--reference", tmp_path / "none", *random), "no such folder")
    is_refused(run("evaluate", pristine, *random, "--seq-len", "65"), "longer than the model takes")


def test_generate_refuses_more_tokens_than_the_model_takes(run: Run, pristine: Path) -> None:
    is_refused(run("generate", pristine, "w5 " * 60, "--max-new-tokens", "5"), "prompt of 60 tokens", "64")
    is_refused(run("generate", pristine, ""), "no tokens")


def test_inspect_refuses_what_is_no_config(run: Run, pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    is_refused(run("inspect", tmp_path / "config.json"))
    is_refused(run("inspect", pristine / "model.safetensors"))
    is_refused(run("inspect", tmp_path / "none"), "no such folder")
    is_refused(run("inspect", pristine, "--scheme", "w3a3"), "scheme must be one of")


# --- what scripts rely on ---

LINEAR_KEYS = {
    *("name", "shape", "scheme", "scale_shape", "bytes_before", "bytes_after"),
    *("group", "migration", "folded_into"),
}


def test_json_is_one_object_with_the_promised_keys(run: Run, pristine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized = json.loads(run("quantize", pristine, out, *QUICK, "--json").out)
    assert quantized.keys() >= {"out", "seconds", "peak_rss_bytes", "total_size", "layers", "warnings"}
    assert quantized["out"] == str(out)
    assert all(layer.keys() >= {"name", "error", "migration"} for layer in quantized["layers"])
    inspected = json.loads(run("inspect", out, "--json").out)
    assert inspected.keys() >= {"linears", "total_size_before", "total_size"}
    assert all(linear.keys() >= LINEAR_KEYS for linear in inspected["linears"])
    assert inspected["total_size"] == quantized["total_size"]
    data = ("--data", "random", "--seq-len", "8", "--tokens", "16")
    evaluated = json.loads(run("evaluate", out, "--reference", pristine, *data, "--json").out)
    keys = {"perplexity", "reference_perplexity", "kl", "kl_p99", "top1_agreement", "tokens", "kl_error"}
    assert evaluated.keys() >= keys
    assert evaluated["tokens"] == 14
    generated = json.loads(run("generate", out, "w5 w6", "--max-new-tokens", "3", "--json").out)
    assert generated.keys() >= {"prompt", "text"}


def test_quiet_says_nothing_and_progress_is_plain_lines(run: Run, pristine: Path, tmp_path: Path) -> None:
    assert run("quantize", pristine, tmp_path / "quiet", *QUICK).err == ""
    lines = run("quantize", pristine, tmp_path / "loud", *QUICK[:-1]).err.splitlines()
    assert lines[-1] == "quantizing: 2/2"
    assert all(line.count(": ") == 1 and "/" in line for line in lines)


def test_progress_calls_models_what_the_user_called_them(run: Run, pristine: Path) -> None:
    data = ("--data", "random", "--seq-len", "8", "--tokens", "16")
    assert f"running {pristine.name}: 2/2" in run("evaluate", pristine, *data).err
    assert "running demo: " in run("evaluate", "demo", *data).err


@pytest.mark.parametrize("columns", ["30", "80", "200"])
def test_no_name_is_cut_at_any_width(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    quantized = run("quantize", pristine, tmp_path / "out", *QUICK).out
    worst = set(re.findall(r"model\.layers\.[01]\.(?:self_attn|mlp)\.[a-z]+_proj\b", quantized))
    assert len(worst) == 10
    inspected = run("inspect", tmp_path / "out").out
    for name in ("model.layers.1", "  self_attn.q_proj", "  mlp.down_proj", "lm_head", "44×30", "30×1"):
        assert name in inspected
    assert "…" not in quantized + inspected


def test_at_eighty_columns_no_line_is_longer(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("quantize", pristine, tmp_path / "out", *QUICK).out.splitlines()
    lines += run("inspect", tmp_path / "out").out.splitlines()
    # The first line names the output folder, however long that is.
    assert max(map(len, lines[1:])) <= 80


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect", "generate"])
def test_help_has_an_example(run: Run, command: str) -> None:
    assert f"qlinear {command} " in run(command, "--help").out.split("Example")[1]


# --- the application's own options ---


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == Ran(0, f"qlinear {version('qlinear')}\n", "")


@pytest.mark.parametrize(("words", "completion"), [
    ("qlinear quan", "quantize"),
    ("qlinear quantize --scheme w4a16-g", "w4a16-g32"),
    ("qlinear convert --format lm", "lmdeploy"),
    ("qlinear evaluate --ref", "--reference"),
])  # fmt: skip
def test_a_shell_completes_commands_options_and_their_values(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, completion: str
) -> None:
    monkeypatch.setenv("_QLINEAR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert completion in run().out.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_can_show_the_completion_of_a_shell(shell: str, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("_QLINEAR_COMPLETE", f"source_{shell}")
    assert "_QLINEAR_COMPLETE=complete" in run().out


# --- processes of their own ---


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_as_a_process_it_exits_with_two_and_one_line(tmp_path: Path) -> None:
    ran = process("-m", "qlinear", "quantize", str(tmp_path / "none"), str(tmp_path / "out"))
    is_refused(Ran(ran.returncode, ran.stdout, ran.stderr), "no such folder")


def test_other_libraries_say_nothing(model: Path, tmp_path: Path) -> None:
    # transformers would warn that this type of rotary embedding has no validation, and of generation settings.
    edit_config(model, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "zorg": 3})
    ran = process("-m", "qlinear", "quantize", str(model), str(tmp_path / "out"), *QUICK, "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["warnings"] == []


def test_a_finished_folder_is_verified(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", model, out, *QUICK).code == 0
    ran = run("inspect", "--verify", out, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["tensors"] > 0
    weights = next(out.glob("model*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    is_refused(run("inspect", "--verify", out, "--quiet"), "has changed")
