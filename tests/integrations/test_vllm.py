"""vLLM serves what we write: `make test-vllm` runs this in an environment that has the engine; elsewhere it is skipped.

The engine runs in processes of its own, all cases in one for each number of ranks. Its perplexity must be within 0.2%
of our own runtime's wherever it serves a case at all, and what it refuses, it must refuse for a known reason. What came
of each case is written to build/vllm/table.json and, as a table, to build/vllm/table.md.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from .serving import table
from .serving.cases import make_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "vllm"
TOLERANCE = 0.002
PORT = 8123
Result = dict[str, Any]


def run(*arguments: str, **environment: str) -> str:
    """The output of a module in a process of its own."""
    command = [sys.executable, "-m", *arguments]
    settings = os.environ | environment
    return subprocess.run(
        command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, check=True
    ).stdout


def serve(cases: list[Result], ranks: int = 1, **environment: str) -> dict[str, Result]:
    """What the engine makes of each case, by name."""
    listed, results = WORK / "served.json", WORK / "results.jsonl"
    listed.write_text(json.dumps(cases))
    results.unlink(missing_ok=True)
    run("tests.integrations.serving.engine", str(listed), str(results), RANKS=str(ranks), **environment)
    return {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}


@pytest.fixture(scope="session")
def cases() -> list[Result]:
    return make_cases(WORK)


@pytest.fixture(scope="session")
def served(cases: list[Result]) -> list[Result]:
    """Every case on one rank and on two, as rows of the table."""
    rows = [table.row(case, None, 1) for case in cases if "refused" in case]
    wanted = [case for case in cases if "refused" not in case]
    for ranks in (1, 2):
        results = serve(wanted, ranks)
        rows += [table.row(case, results[case["name"]], ranks) for case in wanted]
    table.write(rows, WORK)
    return rows


def test_perplexity_is_our_own_runtimes_wherever_the_engine_runs(served: list[Result]) -> None:
    runs = [row for row in served if row["status"] == "runs"]
    assert {row["layout"] for row in runs} >= {"folded", "kept-unfolded", "kept-always", "lmdeploy-kept"}
    assert {row["ranks"] for row in runs} == {1, 2}
    off = [row for row in runs if abs(row["difference"]) > TOLERANCE]
    assert not off, off


def test_what_does_not_run_lacks_a_kernel_and_nothing_else(served: list[Result]) -> None:
    unexplained = [row for row in served if row["status"] == "fails"]
    assert not unexplained, unexplained


def test_kept_scales_are_divided_out_in_every_layer(cases: list[Result]) -> None:
    wanted = [
        case for case in cases if case["name"] in ("demo.w8a8.kept-always", "unfolded.w8a8.kept-unfolded")
    ]
    results = serve(wanted)
    always = results["demo.w8a8.kept-always"]["layers"]
    assert all("divided" in what for name, what in always.items() if name.endswith("_proj"))
    unfolded = results["unfolded.w8a8.kept-unfolded"]["layers"]
    assert {name.rpartition(".")[2] for name, what in unfolded.items() if "divided" in what} == {"c_proj"}


def test_without_the_plugin_the_engine_names_the_unknown_method(cases: list[Result]) -> None:
    kept = [case for case in cases if case["name"] == "demo.w8a8.kept-always"]
    result = serve(kept, VLLM_PLUGINS="")["demo.w8a8.kept-always"]
    assert "Unknown quantization method: qlinear" in result["error"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t["model.layers.1.self_attn.k_proj.migration_scale"].mul_(2), "must be equal"),
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.migration_scale"), "must be equal"),
        (lambda t: shorten(t, "model.layers.1.mlp.down_proj.migration_scale"), "must have shape (512,)"),
    ],
    ids=["unequal", "missing", "too-short"],
)
def test_wrong_vectors_are_refused_on_loading(
    edit: Callable[[dict[str, Tensor]], object], message: str, cases: list[Result], tmp_path: Path
) -> None:
    kept = next(case for case in cases if case["name"] == "demo.w8a8.kept-always")
    folder = shutil.copytree(kept["folder"], tmp_path / "wrong")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    error = serve([kept | {"folder": str(folder)}])[kept["name"]]["error"]
    assert message in error
    assert "model.layers.1." in error


def shorten(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("scheme", ["w8a16", "fp8-static", "fp8-block"])
def test_without_a_kernel_the_engine_still_creates_our_tensors(scheme: str, cases: list[Result]) -> None:
    kept = next(case for case in cases if case["name"] == f"demo.{scheme}.kept-always")
    output = run("tests.integrations.serving.creation", kept["folder"], "model.layers.0.mlp.down_proj")
    made = json.loads(output.splitlines()[-1])
    assert made["created"].keys() == made["stored"].keys()
    assert made["created"].pop("migration_scale")["shape"] == [1, 512]
    for name, created in made["created"].items():
        assert created["shape"] == made["stored"][name]["shape"], name
        is_scale = name == "weight_scale"  # the engine casts those of packed weights to the model's dtype
        assert is_scale or created["dtype"] == made["stored"][name]["dtype"], name


def test_the_server_completes_text_and_chats(cases: list[Result]) -> None:
    kept = next(case for case in cases if case["name"] == "demo.w8a8.kept-always")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    where = ["--host", "127.0.0.1", "--port", str(PORT)]
    model = ["--model", kept["folder"], "--served-model-name", "demo", "--max-model-len", "300"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *where]
    command += ["--chat-template", template]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    server = subprocess.Popen(command, env=os.environ | settings)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/health", server)
        said = post("completions", {"model": "demo", "prompt": "The list", "max_tokens": 8})
        assert said["choices"][0]["text"]
        messages = [{"role": "user", "content": "What is a list?"}]
        answer = post("chat/completions", {"model": "demo", "messages": messages, "max_tokens": 8})
        assert answer["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Until a server answers there, or has ended."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        assert server.poll() is None, "the server ended before it was ready"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer from {url} in {seconds} s")


def post(path: str, body: dict[str, Any]) -> Any:
    """The server's answer to a request."""
    url, headers = f"http://127.0.0.1:{PORT}/v1/{path}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
