"""What each scheme costs in quality, beside llmcompressor and AutoRound on the same calibration tokens.

    python benchmarks/quality.py [--env FOLDER] [--autoround-env FOLDER] [--work FOLDER] [--models NAME …]
        [--schemes NAME …] [--only ours peers AutoRound]

Three models of one trained network: `planted` is the embedded one, with outlier channels; `unplanted` has none; in
`other` different channels are planted, in more places and less far. All compute the same function, so all are compared
with the same original. Every row is evaluated by `qlinear.evaluate` in float32 on the held-out text; the error of a
mean KL is that over sequences. What searching alpha changes is said in such errors, of the difference in pairs.
Peers run in environments of their own, which are made if they are missing.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

import qlinear
from qlinear import demo
from qlinear.api.evaluate import Evaluation, standard_error
from qlinear.checkpoint.reader import Checkpoint
from qlinear.streaming.open_model import calibration_ids, evaluation_ids, open_model

sys.path.insert(0, str(Path(__file__).parent))
from environments import AUTOROUND, LLMCOMPRESSOR, environment, run_peer
from peers import as_mappings, folds_of

ROOT = Path(__file__).parent
GROUPS = "groups.json"

Options = Mapping[str, Any]
AUTO: Options = {"smooth": "auto"}
GPTQ: Options = {"algorithm": "gptq"}
BEST: Options = {**AUTO, **GPTQ, "refine": 2}
# Of each scheme, what we offer for it. A row whose name begins with "auto" has its twin at alpha 0.5.
OURS: dict[str, dict[str, Options]] = {
    "w8a8": {
        "default": {},
        "auto": AUTO,
        "gptq": GPTQ,
        "auto, gptq": AUTO | GPTQ,
        "auto, gptq, refined": BEST,
    },
    "w8a8-static": {
        "default": {},
        "auto": AUTO,
        "gptq": GPTQ,
        "auto, gptq": AUTO | GPTQ,
        "auto, gptq, refined": BEST,
    },
    "w8a8-asym": {"default": {}, "auto": AUTO},
    "w8a8-static-asym": {
        "default": {},
        "auto": AUTO,
        "gptq": GPTQ,
        "auto, gptq": AUTO | GPTQ,
        "auto, gptq, refined": BEST,
    },
    "w4a16": {
        "smooth off": {"smooth": "off"},
        "default": {},
        "auto": AUTO,
        "awq": {"algorithm": "awq"},
        "gptq": GPTQ,
        "auto, gptq": AUTO | GPTQ,
        "auto, gptq, refined": BEST,
    },
    "w4a8": {
        "default": {},
        "auto": AUTO,
        "gptq": GPTQ,
        "auto, gptq": AUTO | GPTQ,
        "auto, gptq, refined": BEST,
        "auto, gptq, refined longer": {**BEST, "refine": 4},
    },
}
# Of each scheme, what llmcompressor is asked for besides its defaults. Its documents recommend SmoothQuant before GPTQ
# for W8A8, and GPTQ for the others; what else it can do is tried too.
LLMCOMPRESSOR_ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "w8a8": {
        "SmoothQuant": ("--smooth",),
        "SmoothQuant, gptq": ("--smooth", "--algorithm", "gptq"),
        "SmoothQuant, our groups": ("--smooth", "--mappings", GROUPS),
        "SmoothQuant, gptq, our groups": ("--smooth", "--algorithm", "gptq", "--mappings", GROUPS),
    },
    "w4a16": {
        "rtn": ("--scheme", "W4A16"),
        "gptq": ("--scheme", "W4A16", "--algorithm", "gptq"),
        "SmoothQuant, gptq": ("--scheme", "W4A16", "--algorithm", "gptq", "--smooth"),
    },
    "w4a8": {
        "gptq": ("--scheme", "W4A8", "--algorithm", "gptq"),
        "SmoothQuant, gptq": ("--scheme", "W4A8", "--algorithm", "gptq", "--smooth"),
    },
}


@dataclass(frozen=True)
class Row:
    """One checkpoint, and what it lost."""

    name: str
    cost: Evaluation

    @property
    def kl(self) -> float:
        return self.cost.kl or 0.0


@dataclass(frozen=True)
class Task:
    """What all rows share. peers, autoround: the Pythons of their environments. only: whose rows are made."""

    work: Path
    calibration: Tensor
    evaluation: Tensor
    peers: Path
    autoround: Path
    only: Sequence[str]

    @property
    def ids(self) -> Path:
        return self.work / "calibration.safetensors"

    def row(self, name: str, checkpoint: Path, seconds: float, scheme: str) -> Row:
        cost = qlinear.evaluate(checkpoint, "demo", data=self.evaluation, dtype="float32")
        print(
            f"| {scheme} | {name} | {cost.kl:.3e} | {cost.kl_error:.1e} | {cost.kl_p99:.3e} | "
            f"{cost.top1_agreement:.2%} | {seconds:.0f} |",
            flush=True,
        )
        return Row(name, cost)


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


def our_rows(task: Task, model: Path, scheme: str) -> Iterator[Row]:
    for name, options in OURS[scheme].items():
        out = task.work / "ours"
        result = qlinear.quantize(model, out, scheme, calibration=task.calibration, overwrite=True, **options)
        yield task.row(f"qlinear, {name}", out, result.seconds, scheme)


def write_groups(task: Task, model: Path) -> None:
    """Our groups as llmcompressor's `mappings`, those of one size with what feeds them: with others it fails."""
    out = task.work / "ours"
    qlinear.quantize(model, out, calibration=task.calibration, overwrite=True)
    shapes = {name: info.shape for name, info in Checkpoint.open(model).tensors.items()}
    fitting = {
        reader: producer
        for reader, producer in folds_of(out).items()
        if shapes[f"{reader}.weight"][1] == shapes[f"{producer}.weight"][0]
    }
    (task.work / GROUPS).write_text(json.dumps(as_mappings(fitting)))


def llmcompressor_rows(task: Task, model: Path, scheme: str) -> Iterator[Row]:
    rows = LLMCOMPRESSOR_ROWS.get(scheme, {})
    if any(GROUPS in options for options in rows.values()):
        write_groups(task, model)
    for name, options in rows.items():
        yield from peer_row(
            task,
            model,
            scheme,
            f"llmcompressor, {name}",
            task.peers,
            "quantize_with_llmcompressor.py",
            options,
        )


def autoround_rows(task: Task, model: Path, scheme: str) -> Iterator[Row]:
    if scheme == "w4a16":
        script = "quantize_with_autoround.py"
        yield from peer_row(task, model, scheme, "AutoRound", task.autoround, script, ())


def peer_row(
    task: Task, model: Path, scheme: str, name: str, python: Path, script: str, options: tuple[str, ...]
) -> Iterator[Row]:
    """The row that a peer's script gives; a line with the reason, and none, where it fails."""
    out = task.work / "-".join((scheme, *name.replace(",", "").split()))
    try:
        seconds = run_peer(python, script, model, task.ids, out, *options)
    except RuntimeError as error:
        print(f"| {scheme} | {name} | failed: {str(error)[:120]} | | | | |", flush=True)
        return
    yield task.row(name, out, seconds, scheme)


def rows(task: Task, model: Path, scheme: str) -> Iterator[Row]:
    makers = {"ours": our_rows, "peers": llmcompressor_rows, "AutoRound": autoround_rows}
    for whose in task.only:
        yield from makers[whose](task, model, scheme)


def compare(scheme: str, found: Sequence[Row]) -> None:
    """Our best over theirs, with our groups and without; and what searching alpha changed."""
    kl = {row.name: row.kl for row in found}
    ours = [name for name in kl if name.startswith("qlinear")]
    handed = [name for name in kl if "our groups" in name]
    alone = [name for name in kl if name not in ours and name not in handed]
    for theirs in (alone, handed):
        if ours and theirs:
            best, peer = (min(names, key=kl.__getitem__) for names in (ours, theirs))
            print(f"| {scheme} | {best} ÷ {peer} | {kl[best] / kl[peer]:.3f} | | | | |", flush=True)
    costs = {row.name: row.cost.sequence_kl for row in found}
    for name in ours:
        twin = costs.get(name.replace("auto, ", "").replace("qlinear, auto", "qlinear, default"))
        if "auto" in name and twin:
            change = [a - b for a, b in zip(costs[name], twin, strict=True)]
            mean, error = sum(change) / len(change), standard_error(change)
            print(
                f"| {scheme} | {name} - alpha 0.5 | {mean:+.2e} | {error:.1e} | {mean / error:+.1f} errors | | |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument("--autoround-env", type=Path, default=Path("build/peers/autoround"))
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--models", nargs="+", default=["planted", "unplanted", "other"])
    parser.add_argument("--schemes", nargs="+", default=list(OURS))
    whose = ["ours", "peers", "AutoRound"]
    parser.add_argument("--only", nargs="+", choices=whose, default=whose)
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens of the calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    source = open_model("demo")
    task = Task(
        work,
        calibration_ids("demo", source, args.samples, 512, seed=0),
        evaluation_ids("demo", source, args.tokens, 512),
        environment(args.env, LLMCOMPRESSOR) if "peers" in args.only else Path(),
        environment(args.autoround_env, AUTOROUND) if "AutoRound" in args.only else Path(),
        args.only,
    )
    save_file({"input_ids": task.calibration}, task.ids)
    for name, model in models(work).items():
        if name not in args.models:
            continue
        print(f"\n{name}, {task.calibration.numel()} calibration tokens\n")
        print("| scheme | row | KL, mean | its error | KL, p99 | same top token | seconds |")
        print("|---|---|---:|---:|---:|---:|---:|")
        for scheme in args.schemes:
            compare(scheme, list(rows(task, model, scheme)))


if __name__ == "__main__":
    main()
