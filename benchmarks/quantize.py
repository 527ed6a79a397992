"""How long the main job takes, how much memory, and how that compares: with the machine, and with llmcompressor.

    python benchmarks/quantize.py [--layers 22] [--scheme w8a8] [--algorithm rtn] [--smooth 0.5]
        [--env FOLDER] [--peer-dtype float32] [--no-peer]

A checkpoint of the shape of a 1.1B Llama (bfloat16, random weights) is made in a temporary folder, and quantized with
16 sequences of 512 random tokens by `qlinear quantize` and by llmcompressor, each in a process of its own, one after
the other: seconds are from the start of the process to its end, memory is the most that it had resident. Both get the
same token ids; the source is in the page cache for both. 4-bit GPTQ alone, in both:

    python benchmarks/quantize.py --scheme w4a16 --algorithm gptq --smooth off --peer-dtype float32

The least that the job can take is one forward pass over the tokens at the machine's rate for matrix products (two
for GPTQ: blocks are calibrated with what the quantized blocks before them give), and reading the source and writing
the result at the rate of its disk (of its memory, where the files are cached).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from qlinear import demo
from qlinear.checkpoint.reader import Checkpoint
from qlinear.checkpoint.writer import ShardWriter
from qlinear.runtime.device import CPU
from qlinear.streaming.meta_model import build_meta_model
from qlinear.streaming.open_model import calibration_ids, open_model
from qlinear.streaming.streamed_model import compute_dtype

sys.path.insert(0, str(Path(__file__).parent))
from environments import LLMCOMPRESSOR, SCRIPTS, environment

SAMPLES, SEQ_LEN = 16, 512
GB = 1e9


@dataclass(frozen=True)
class Run:
    """A process that has ended: seconds from its start to its end, and the most bytes that it had resident."""

    name: str
    seconds: float
    peak: int


@dataclass(frozen=True)
class Task:
    """What both are asked for. smooth: alpha, or "off"; llmcompressor's is always 0.5."""

    scheme: str
    algorithm: str
    smooth: str

    @property
    def is_smoothed(self) -> bool:
        return self.smooth != "off"

    @property
    def passes(self) -> int:
        """Forward passes through the blocks that the job needs."""
        return 2 if self.algorithm == "gptq" else int(self.is_smoothed)


@dataclass(frozen=True)
class Machine:
    """Rates of this machine: matrix products in flop/s by dtype; reading from the page cache and writing, bytes/s."""

    products: dict[torch.dtype, float]
    read: float
    write: float


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, written one by one, and the demo's tokenizer, since peers want some."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, dtype=torch.bfloat16,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    writer = ShardWriter(folder)
    for name, tensor in build_meta_model(folder).state_dict().items():
        made = torch.ones(tensor.shape)
        if tensor.dim() > 1:
            made = torch.randn(tensor.shape, generator=generator).mul_(0.02)
        writer.add(name, made.to(torch.bfloat16))
    writer.finish()
    copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> None:
    """The demo's tokenizer, for a checkpoint of random weights."""
    tokenizer = Checkpoint.open(demo.checkpoint_path())
    for file in tokenizer.other_files():
        if file.name.startswith(("tokenizer", "special_tokens")):
            (folder / file.name).write_bytes((tokenizer.path / file).read_bytes())


def best(measure: Callable[[], None], times: int = 3) -> float:
    """Seconds of the fastest of a few runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        measure()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def product_rate(dtype: torch.dtype, seconds: float = 5.0) -> float:
    """Floating point operations per second of the largest product of a block, kept up for some seconds.

    The rate of a processor under load, as a job of minutes finds it: that of its best moment can be half as much again.
    """
    x, weight = torch.randn(2048, 2048).to(dtype), torch.randn(5632, 2048).to(dtype)
    out = torch.empty(2048, 5632, dtype=dtype)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(x, weight.T, out=out)
        count += 1
    return count * 2 * 2048 * 2048 * 5632 / (time.perf_counter() - began)


def measure_machine(folder: Path) -> Machine:
    """Rates in each dtype that weights come in, and those of files in `folder`."""
    file, data = folder / "rate", os.urandom(1 << 20)
    buffer, size = bytearray(len(data)), 512

    def write() -> None:
        with file.open("wb") as stream:
            for _ in range(size):
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def read() -> None:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    written = best(write)
    rates = Machine(
        {dtype: product_rate(dtype) for dtype in (torch.bfloat16, torch.float32)},
        size * len(data) / best(read), size * len(data) / written,
    )  # fmt: skip
    file.unlink()
    return rates


def run(name: str, command: Sequence[str | Path], folder: Path) -> Run:
    """Run a command to its end. Raises RuntimeError with the end of what it said if it fails."""
    print(f"running {name}", file=sys.stderr, flush=True)
    log = folder / f"{name}.log"
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} failed: {log.read_text()[-500:]}")
    return Run(name, seconds, usage.ru_maxrss * 1024)


def run_ours(source: Path, what: Task, plan: bool = False) -> Run:
    options = ["--calibration", "random", "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--quiet"]
    chosen = ["--scheme", what.scheme, "--algorithm", what.algorithm, "--smooth", what.smooth]
    command = [sys.executable, "-m", "qlinear", "quantize", source, "ours", *chosen, *options]
    return (
        run("plan", [*command, "--plan", "--json"], source.parent)
        if plan
        else run("qlinear", command, source.parent)
    )


def report_plan(said: str, done: Run) -> None:
    """How far what was foretold is from what came."""
    plan = json.loads(said)
    seconds, peak = plan["seconds"] / done.seconds, plan["peak_rss_bytes"] / done.peak
    print(
        f"foretold: {plan['seconds']:.1f} s, {seconds:.2f} of what it took; memory {peak:.2f} of what it took"
    )


def run_theirs(source: Path, python: Path, what: Task, dtype: str) -> Run:
    ids = calibration_ids("random", open_model(source), SAMPLES, SEQ_LEN, seed=0)
    save_file({"input_ids": ids}, source.parent / "calibration.safetensors")
    script = SCRIPTS / "quantize_with_llmcompressor.py"
    chosen = ["--scheme", what.scheme.upper(), "--algorithm", what.algorithm, "--dtype", dtype]
    command = [python, script, source, "calibration.safetensors", "peer", *chosen]
    return run("llmcompressor", command + ["--smooth"] * what.is_smoothed, source.parent)


def least_seconds(source: Path, out: Path, machine: Machine, dtype: torch.dtype, passes: int) -> list[float]:
    """Seconds of the forward passes through the blocks, of reading the source, and of writing the result."""
    checkpoint = Checkpoint.open(source)
    weights = sum(
        info.nbytes // 2 for name, info in checkpoint.tensors.items() if ".layers." in name and len(info.shape) > 1
    )  # fmt: skip
    pass_through = 2 * weights * SAMPLES * SEQ_LEN / machine.products[dtype]
    return [
        passes * pass_through,
        checkpoint.nbytes / machine.read,
        Checkpoint.open(out).nbytes / machine.write,
    ]


def report(runs: Sequence[Run], least: Sequence[float], machine: Machine, dtype: torch.dtype) -> None:
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {d}" for d, rate in machine.products.items())
    print(f"matrix products: {rates}; the job computes in {dtype} on this processor")
    print(f"files: {machine.read / GB:.1f} GB/s read from cache, {machine.write / GB:.2f} GB/s written")
    print(f"passes {least[0]:.1f} s, reading {least[1]:.1f} s, writing {least[2]:.1f} s\n")
    print("| | seconds | of the least | peak memory |")
    print("|---|---:|---:|---:|")
    for each in runs:
        print(
            f"| {each.name} | {each.seconds:.1f} | {each.seconds / sum(least):.2f} | {each.peak / GB:.2f} GB |"
        )
    if len(runs) > 1:
        print(f"\nqlinear is {runs[1].seconds / runs[0].seconds:.2f} times as fast as {LLMCOMPRESSOR[1]}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--scheme", choices=("w8a8", "w4a16", "w4a8"), default="w8a8")
    parser.add_argument("--algorithm", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--smooth", default="0.5", help="alpha, or off")
    parser.add_argument("--env", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument(
        "--peer-dtype", default="auto", help="float32 where the processor only emulates bfloat16"
    )
    parser.add_argument("--no-peer", action="store_true", help="run qlinear alone")
    parser.add_argument(
        "--work", type=Path, help="a folder on the disk to use, not the system's temporary one"
    )
    args = parser.parse_args()
    python = None if args.no_peer else environment(args.env, LLMCOMPRESSOR)
    what = Task(args.scheme, args.algorithm, args.smooth)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source = Path(work) / "source"
        make_checkpoint(source, args.layers)
        machine, dtype = measure_machine(Path(work)), compute_dtype(torch.bfloat16, CPU)
        run_ours(source, what, plan=True)
        runs = [run_ours(source, what)]
        after = product_rate(dtype)
        print(f"products before and after: {machine.products[dtype] / 1e9:.0f}, {after / 1e9:.0f} GFLOP/s")
        machine.products[dtype] = (machine.products[dtype] + after) / 2
        if python is not None:
            runs.append(run_theirs(source, python, what, args.peer_dtype))
        least = least_seconds(source, Path(work) / "ours", machine, dtype, what.passes)
        print(
            f"{args.layers} layers, {SAMPLES} × {SEQ_LEN} tokens, {what.scheme} by {what.algorithm}, "
            f"smooth {what.smooth}; {os.cpu_count()} cores"
        )
        report(runs, least, machine, dtype)
        report_plan((Path(work) / "plan.log").read_text(), runs[0])


if __name__ == "__main__":
    main()
