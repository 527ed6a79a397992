"""A checkpoint larger than memory: a 13B Llama shape, quantized and evaluated under a limit that the kernel enforces.

    python benchmarks/large.py make --work FOLDER          26 GB of random bfloat16 weights
    python benchmarks/large.py quantize --work FOLDER      W8A8 with smoothing on 8 × 512 random tokens
    python benchmarks/large.py evaluate --work FOLDER      the result beside the original, on 512 random tokens
    python benchmarks/large.py clean --work FOLDER

Each stage outlasts ten minutes or may, so they are commands of their own, to be run in the background. The limit
(--limit, 6 GB) is that of a memory cgroup, version 1, which wants root: it counts all that the process has resident and
the page cache that it fills, of which the kernel drops what is clean, and ends a process that needs more.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from quantize import GB, copy_tokenizer
from transformers import LlamaConfig

from qlinear.checkpoint.writer import ShardWriter
from qlinear.data import token_ids
from qlinear.streaming.meta_model import build_meta_model

SAMPLES, SEQ_LEN, EVALUATED = 8, 512, 512
CGROUP = Path("/sys/fs/cgroup/memory/qlinear-benchmark")


def make(source: Path) -> None:
    """Random weights. Drawing thirteen billion would take longer than writing them: all are cut out of one piece."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, dtype=torch.bfloat16,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    source.mkdir()
    config.save_pretrained(source)
    copy_tokenizer(source)
    largest, generator = 32000 * 5120, torch.Generator().manual_seed(0)
    piece = torch.randn(largest + 4096, generator=generator).mul_(0.02).to(torch.bfloat16)
    writer = ShardWriter(source)
    for i, (name, tensor) in enumerate(build_meta_model(source).state_dict().items()):
        start = i * 11 % 4096
        made = torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.dim() > 1:
            made = piece[start : start + tensor.numel()].reshape(tensor.shape)
        writer.add(name, made)
    writer.finish()


def limited(command: Sequence[str | Path], limit: float) -> dict[str, float]:
    """Run a command that prints JSON in a cgroup of its own; with the seconds, and the most bytes, that it took.

    Raises RuntimeError with the end of what it said if it fails.
    """
    CGROUP.mkdir(exist_ok=True)
    try:
        (CGROUP / "memory.limit_in_bytes").write_text(str(int(limit)))
        (CGROUP / "memory.max_usage_in_bytes").write_text("0")
        began = time.perf_counter()
        inside = f'echo $$ > {CGROUP}/cgroup.procs && exec "$@"'
        process = subprocess.Popen(["sh", "-c", inside, "sh", *command], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command[3]} ended with {process.returncode}: {said[-500:]}")
        taken = {"seconds": time.perf_counter() - began, "resident": usage.ru_maxrss * 1024}
        most = float((CGROUP / "memory.max_usage_in_bytes").read_text())
        return json.loads(said) | taken | {"with page cache": most}
    finally:
        CGROUP.rmdir()


def quantize(source: Path, out: Path, limit: float) -> None:
    shutil.rmtree(out, ignore_errors=True)
    options = [
        "--calibration",
        "random",
        "--samples",
        SAMPLES,
        "--seq-len",
        SEQ_LEN,
        "--max-memory",
        f"{limit / GB}GB",
    ]
    command = [sys.executable, "-m", "qlinear", "quantize", source, out, *map(str, options), "--json"]
    report("quantize", limited(command, limit), limit)


def evaluate(source: Path, out: Path, limit: float) -> None:
    text = source.parent / "text.txt"
    words = token_ids("random", 1, EVALUATED, config=LlamaConfig(vocab_size=1000), tokenizer=None, seed=0)
    text.write_text(" ".join(map(str, words.flatten().tolist())))
    options = ["--data", text, "--tokens", str(EVALUATED), "--seq-len", str(EVALUATED)]
    command = [sys.executable, "-m", "qlinear", "evaluate", out, "--reference", source, *options, "--json"]
    report("evaluate", limited(command, limit), limit)


def report(name: str, figures: dict[str, float], limit: float) -> None:
    print(
        f"{name}: {figures['seconds']:.0f} s, at most {figures['resident'] / GB:.2f} GB resident, "
        f"{figures['with page cache'] / GB:.2f} of {limit / GB:.2f} GB with page cache"
    )
    if name == "evaluate":
        print(f"KL {figures['kl']:.3g}, perplexity {figures['perplexity']:.0f} on random text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["make", "quantize", "evaluate", "clean"])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with 45 GB to spare")
    parser.add_argument("--limit", type=float, default=6, help="GB")
    args = parser.parse_args()
    source, out = args.work / "13b", args.work / "13b-w8a8"
    if args.stage == "make":
        make(source)
    elif args.stage == "quantize":
        quantize(source, out, args.limit * GB)
    elif args.stage == "evaluate":
        evaluate(source, out, args.limit * GB)
    else:
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
