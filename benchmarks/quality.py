"""What each scheme costs in quality, beside llmcompressor and AutoRound on the same calibration tokens.

    python benchmarks/quality.py [--env FOLDER] [--autoround-env FOLDER] [--work FOLDER] [--models NAME …]

Three models of one trained network: `planted` is the embedded one, with outlier channels; `unplanted` has none; in
`other` different channels are planted, in more places and less far. All compute the same function, so all are compared
with the same original. Every row is evaluated by `qlinear.evaluate` in float32 on the held-out text; the error of a
mean KL is that over sequences. Peers run in environments of their own, which are made if they are missing.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

import qlinear
from qlinear import demo
from qlinear.inputs import calibration_ids, evaluation_ids, open_model

ROOT = Path(__file__).parent
LLMCOMPRESSOR = ("torch==2.13.0", "llmcompressor==0.14.0.1")
AUTOROUND = ("torch==2.13.0", "auto-round")

Options = Mapping[str, Any]
# Of each scheme, what we offer for it, and what the peers do: their script and its options.
OURS: dict[str, dict[str, Options]] = {
    "w8a8": {
        "default": {},
        "auto": {"smooth": "auto"},
        "auto, gptq": {"smooth": "auto", "algorithm": "gptq"},
    },
    "w8a8-static": {"default": {}, "auto": {"smooth": "auto"}},
    "w4a16": {
        "smooth off": {"smooth": "off"},
        "awq": {"algorithm": "awq"},
        "gptq": {"algorithm": "gptq"},
        "auto, gptq": {"smooth": "auto", "algorithm": "gptq"},
    },
    "w4a8": {"gptq": {"algorithm": "gptq"}, "auto, gptq": {"smooth": "auto", "algorithm": "gptq"}},
}
PEERS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "w8a8": {"llmcompressor": ("quantize_with_llmcompressor.py", ())},
    "w4a16": {
        "llmcompressor, rtn": ("quantize_4bit_with_llmcompressor.py", ("--algorithm", "rtn")),
        "llmcompressor, gptq": ("quantize_4bit_with_llmcompressor.py", ("--algorithm", "gptq")),
        "AutoRound": ("quantize_with_autoround.py", ()),
    },
    "w4a8": {"llmcompressor, gptq": ("quantize_4bit_with_llmcompressor.py", ("--scheme", "W4A8"))},
}


@dataclass(frozen=True)
class Task:
    """What all rows share. environments: the Python of each peer, by its script's name."""

    work: Path
    calibration: Tensor
    evaluation: Tensor
    environments: Mapping[str, Path]

    def row(self, name: str, checkpoint: Path, seconds: float, schemes: str) -> tuple[str, float]:
        cost = qlinear.evaluate(checkpoint, "demo", data=self.evaluation, dtype="float32")
        print(
            f"| {schemes} | {name} | {cost.kl:.3e} | {cost.kl_p99:.3e} | {cost.top1_agreement:.2%} | {seconds:.0f} |",
            flush=True,
        )
        return name, cost.kl or 0.0


def models(work: Path) -> dict[str, Path]:
    """The three checkpoints, by name."""
    unplanted = demo.write_unplanted(work / "unplanted")
    other = work / "other"
    shutil.copytree(unplanted, other, dirs_exist_ok=True)
    spec = importlib.util.spec_from_file_location("plant_demo", ROOT.parent / "scripts" / "plant_demo.py")
    assert spec is not None
    assert spec.loader is not None
    planting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planting)
    planting.SEED, planting.SHARE = 1234, 0.05
    planting.NORM_EXPONENTS, planting.LINEAR_EXPONENTS = (5, 5, 4, 4, 4, 3, 3, 3, 3, 3), (4, 3)
    plan = planting.plan_outliers(LlamaConfig.from_pretrained(unplanted))
    tensors = demo.rescaled(load_file(unplanted / "model.safetensors"), plan)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    return {"planted": demo.checkpoint_path(), "unplanted": unplanted, "other": other}


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment with these packages, made if it is missing."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def our_rows(task: Task, model: Path, scheme: str) -> Iterator[tuple[str, float]]:
    for name, options in OURS[scheme].items():
        out = task.work / "ours"
        result = qlinear.quantize(model, out, scheme, calibration=task.calibration, overwrite=True, **options)
        yield task.row(f"qlinear, {name}", out, result.seconds, scheme)


def peers_rows(task: Task, model: Path, scheme: str) -> Iterator[tuple[str, float]]:
    for name, (script, options) in PEERS.get(scheme, {}).items():
        out = task.work / "peer"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            task.environments[script], (ROOT / "peers" / script).absolute(), model.absolute(),
            task.work / "calibration.safetensors", out, *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=task.work)
        if done.returncode:
            print(
                f"| {scheme} | {name} | failed: {done.stderr.strip().splitlines()[-1][:120]} | | | |",
                flush=True,
            )
            continue
        yield task.row(name, out, json.loads(done.stdout.splitlines()[-1])["seconds"], scheme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument("--autoround-env", type=Path, default=Path("build/peers/autoround"))
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--models", nargs="+", default=["planted", "unplanted", "other"])
    parser.add_argument("--schemes", nargs="+", default=list(OURS))
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens of the calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    theirs, autoround = environment(args.env, LLMCOMPRESSOR), environment(args.autoround_env, AUTOROUND)
    source = open_model("demo")
    calibration = calibration_ids("demo", source, args.samples, 512, seed=0)
    save_file({"input_ids": calibration}, work / "calibration.safetensors")
    scripts = {script for rows in PEERS.values() for script, _ in rows.values()}
    environments = {script: autoround if "autoround" in script else theirs for script in scripts}
    task = Task(work, calibration, evaluation_ids("demo", source, args.tokens, 512), environments)
    for name, model in models(work).items():
        if name not in args.models:
            continue
        print(f"\n{name}, {calibration.numel()} calibration tokens\n")
        print(
            "| scheme | row | KL, mean | KL, p99 | same top token | seconds |\n|---|---|---:|---:|---:|---:|"
        )
        for scheme in args.schemes:
            ours, peers = list(our_rows(task, model, scheme)), list(peers_rows(task, model, scheme))
            if peers:
                best, peer = (min(rows, key=lambda row: row[1]) for rows in (ours, peers))
                print(
                    f"| {scheme} | best, {best[0]} ÷ {peer[0]} | {best[1] / peer[1]:.3f} | | | |", flush=True
                )


if __name__ == "__main__":
    main()
