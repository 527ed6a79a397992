"""Several processes at one job write what one process alone writes."""

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import qlinear
from qlinear import QLinearError
from qlinear.api.calibrate import write_statistics
from qlinear.runtime import distributed as ranks
from qlinear.runtime.device import moved
from qlinear.runtime.distributed import Ranks

from ..support.dying import killed
from ..support.models import contents, save_model

pytestmark = pytest.mark.slow

# Enough sequences for more micro-batches (of 1024 tokens at most) than there are ranks.
IDS = torch.arange(3, 3 + 5 * 600).remainder(90).add(3).reshape(5, 600)
WIDE = {"max_position_embeddings": 1024}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "auto": ("llama", {}, {"smooth": "auto", "keep_worst": 2, "scheme": "w8a8-static"}),
    "gptq": ("llama", {}, {"algorithm": "gptq"}),
    "propagated": ("gemma3_text", {"num_attention_heads": 2}, {"propagate": True, "format": "qlinear"}),
    "experts": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 1, "moe_intermediate_size": 12},
        {"algorithm": "gptq", "scheme": "w8a16"},
    ),
    "idle experts": (
        "qwen3_moe",
        {"num_experts": 40, "num_experts_per_tok": 1, "moe_intermediate_size": 12},
        {"propagate": True},
    ),
    "refined": ("llama", {}, {"refine": 1, "scheme": "w8a8-static"}),
    "no data": ("llama", {}, {"smooth": "off"}),
}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.dying"])


class Tensors(pickle.Pickler):
    """Finds the devices of all tensors in a value, however deep and in whatever they lie."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.devices: set[str] = set()

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        self.devices.add(value.device.type)
        return str, ()


def moved_whole(value: Any, device: torch.device) -> Any:
    """`moved`, once it is sure that no tensor in what is told would be left behind on an accelerator."""
    found = Tensors()
    found.dump(moved(value, torch.device("meta")))
    assert found.devices <= {"meta"}
    return moved(value, device)


def run(
    rank: int,
    size: int,
    meeting: Path,
    out: Path,
    source: Path,
    options: dict[str, Any],
    as_from_accelerators: bool = False,
) -> None:
    """One of `size` processes; what it raises is left beside the result. Statistics alone go into a file."""
    torch.set_num_threads(1)
    if as_from_accelerators:
        ranks.moved = moved_whole
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    try:
        (write_statistics if out.suffix else qlinear.quantize)(source, out, **options)
    except QLinearError as error:
        out.with_name(f"{out.name}-rank{rank}.txt").write_text(f"{error.known_to_all} {error}")
    finally:
        dist.destroy_process_group()


def run_many(
    size: int, out: Path, source: Path, options: dict[str, Any], as_from_accelerators: bool = False
) -> None:
    meeting = out.with_name(f"{out.name}-meeting")
    processes = [
        _CONTEXT.Process(target=run, args=(rank, size, meeting, out, source, options, as_from_accelerators))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    meeting.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_write_what_one_writes(case: str, tmp_path: Path) -> None:
    kind, shape, options = CASES[case]
    source = save_model(tmp_path / "source", kind, **WIDE, **shape)
    options = {"calibration": IDS, "samples": len(IDS), "seq_len": IDS.shape[1], **options}
    run_many(2, tmp_path / "two", source, options)
    if "gptq" in options.values() or "refine" in options:  # sums depend on who adds what, and on nothing else
        run_many(2, tmp_path / "again", source, options)
        assert contents(tmp_path / "two") == contents(tmp_path / "again")
        return
    qlinear.quantize(source, tmp_path / "one", **options)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_what_comes_from_accelerators_is_told_as_well(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", **WIDE, **CASES["experts"][1])
    options = {"calibration": IDS, "samples": 5, "seq_len": 600, "propagate": True, "smooth": "auto"}
    run_many(2, tmp_path / "two", source, options, as_from_accelerators=True)
    qlinear.quantize(source, tmp_path / "one", **options)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_more_ranks_than_batches_and_after_a_kill(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", num_hidden_layers=3, **WIDE)
    options = {"calibration": IDS[:2], "samples": 2, "seq_len": 600, "propagate": True, "smooth": 0.6}
    qlinear.quantize(source, tmp_path / "one", **options)
    assert killed(source, tmp_path / "three", 5, options)
    run_many(3, tmp_path / "three", source, options)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_the_leader_refines_though_there_are_more_ranks_than_batches(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", **WIDE)
    options = {"calibration": IDS[:1], "samples": 1, "seq_len": 600, "scheme": "w4a16-channel"}
    qlinear.quantize(source, tmp_path / "one", refine=2, **options)
    run_many(3, tmp_path / "three", source, {"refine": 2, **options})
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_what_goes_wrong_on_one_rank_all_ranks_say(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    run_many(2, tmp_path / "out", source, {"calibration": IDS})
    said = [(tmp_path / f"out-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("True")
    assert "not empty" in said[0]


def test_statistics_are_those_of_all_ranks_tokens(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", num_experts=40, moe_intermediate_size=12, **WIDE)
    options = {"calibration": IDS[:4], "samples": 4, "seq_len": 600}
    run_many(2, tmp_path / "two.safetensors", source, options)
    write_statistics(source, tmp_path / "one.safetensors", **options)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        is_extreme = name.endswith(("max", "min"))
        torch.testing.assert_close(
            two[name], tensor, rtol=0 if is_extreme else 1e-4, atol=0 if is_extreme else 1e-5
        )


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_in_turn_are_the_whole(count: int, size: int) -> None:
    items = list(range(count))
    parts = [Ranks(rank, size).shard(items) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) == max(map(len, parts))


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "qlinear", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_torchrun_takes_the_same_command(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", **WIDE)
    flags = ["--calibration", "random", "--samples", "5", "--seq-len", "600", "--json", "--quiet"]
    done = torchrun("quantize", source, tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "two")
    qlinear.quantize(source, tmp_path / "one", calibration="random", samples=5, seq_len=600)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_one_process_speaks_for_all(tmp_path: Path) -> None:
    done = torchrun("quantize", tmp_path / "nothing", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("no such folder") == 1
