"""What W8A8 costs the embedded model in qlinear and in llmcompressor, and which part of the difference is from where.

    python benchmarks/peers.py [--env FOLDER] [--work FOLDER]

Every row is a checkpoint made from the same weights, the same calibration token ids and the same alpha, and every
one is evaluated by `qlinear.evaluate` in float32 with tokens quantized to absmax / 127. So two rows differ only in
the weights, scales and gains that somebody wrote. llmcompressor is installed into an environment of its own.

Rows that leave out one kind of fold say what each is worth, and rows in float32 what computing in the checkpoint's
bfloat16 costs llmcompressor. Given our groups it still differs in one thing: it takes a producer's output for the
input of what reads it, and down_proj reads the product of up_proj's output with another tensor.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import qlinear
from qlinear import demo
from qlinear.api.evaluate import Evaluation
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import get_scheme
from qlinear.streaming.open_model import calibration_ids, evaluation_ids, open_model

sys.path.insert(0, str(Path(__file__).parent))
from environments import LLMCOMPRESSOR, environment, run_peer

SCRIPT = "quantize_with_llmcompressor.py"
WEIGHTS = "model.safetensors"

# Of each linear, the module that its smoothing was folded into.
Folds = Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """What all rows share. work: where checkpoints go. calibration, evaluation: token ids (n, seq_len)."""

    work: Path
    planted: Path
    unplanted: Path
    calibration: Tensor
    evaluation: Tensor

    @classmethod
    def make(cls, work: Path, samples: int, tokens: int) -> "Task":
        work.mkdir(parents=True, exist_ok=True)
        model = open_model("demo")
        calibration = calibration_ids("demo", model, samples, seq_len=512, seed=0)
        save_file({"input_ids": calibration}, work / "calibration.safetensors")
        evaluation = evaluation_ids("demo", model, tokens, seq_len=512)
        return cls(
            work, demo.checkpoint_path(), demo.write_unplanted(work / "unplanted"), calibration, evaluation
        )

    def row(self, name: str, checkpoint: Path, seconds: float | None) -> "Row":
        print(f"evaluating {name}", file=sys.stderr)
        evaluation = qlinear.evaluate(checkpoint, "demo", data=self.evaluation, dtype="float32")
        return Row(name, evaluation, seconds)


@dataclass(frozen=True)
class Row:
    name: str
    cost: Evaluation
    seconds: float | None


def rows_of_ours(task: Task) -> Iterator[Row]:
    def quantize(name: str, model: Path, folder: str, smooth: float | str = 0.5) -> Row:
        out = task.work / folder
        result = qlinear.quantize(model, out, smooth=smooth, calibration=task.calibration, overwrite=True)
        return task.row(name, out, result.seconds)

    def without(name: str, *producers: str) -> Row:
        out = task.work / "-".join(("without", *producers))
        shutil.copytree(task.work / "smoothed", out, dirs_exist_ok=True)
        save_file(without_folds(task, producers), out / WEIGHTS, {"format": "pt"})
        return task.row(name, out, None)

    yield quantize("qlinear, naive", task.planted, "naive", "off")
    yield quantize("qlinear", task.planted, "smoothed")
    yield without("qlinear without v → o", "v_proj")
    yield without("qlinear without up → down", "up_proj")
    yield without("qlinear, norms only", "v_proj", "up_proj")
    yield quantize("qlinear, unplanted model", task.unplanted, "smoothed-unplanted")
    yield quantize("qlinear, unplanted model, naive", task.unplanted, "naive-unplanted", "off")


def folds_of(checkpoint: Path) -> Folds:
    """What `qlinear quantize` noted of where each linear's smoothing went."""
    layers = json.loads((checkpoint / "qlinear.json").read_text())["layers"]
    return {layer["name"]: layer["folded_into"] for layer in layers if layer["folded_into"]}


def without_folds(task: Task, producers: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the smoothed checkpoint as they would be, had nothing been folded into these linears.

    What reads such a linear is smoothed by nothing else, so it is as in the naive checkpoint. The linear itself keeps
    the columns that compensate its norm, which are the ratio of the norm's gains, and is rounded again.
    """
    folds = folds_of(task.work / "smoothed")
    original, naive, tensors = (
        load_file(folder / WEIGHTS) for folder in (task.planted, task.work / "naive", task.work / "smoothed")
    )
    for reader, producer in folds.items():
        if producer.endswith(producers):
            gain = f"{folds[producer]}.weight"
            columns = original[gain].float() / tensors[gain].float()
            matrix = original[f"{producer}.weight"].float() * columns
            weight = quantize_tensor(matrix, get_scheme("w8a8").weight)
            tensors |= {f"{producer}.weight": weight.codes, f"{producer}.weight_scale": weight.scale}
            tensors |= {f"{reader}.{leaf}": naive[f"{reader}.{leaf}"] for leaf in ("weight", "weight_scale")}
    return tensors


def rows_of_llmcompressor(task: Task, python: Path) -> Iterator[Row]:
    def quantize(name: str, model: Path, folder: str, *options: str) -> Row:
        out = task.work / folder
        return task.row(name, out, llmcompressor(task, python, model, out, *options))

    smooth = ("--smooth",)
    groups = (*smooth, "--mappings", str(accepted_groups(task, python)))
    in_float32 = ("--dtype", "float32")
    yield quantize("llmcompressor, naive", task.planted, "peer-naive")
    yield quantize("llmcompressor", task.planted, "peer", *smooth)
    yield quantize("llmcompressor, our groups", task.planted, "peer-groups", *groups)
    yield quantize("llmcompressor, unplanted model", task.unplanted, "peer-unplanted", *smooth)
    yield quantize("llmcompressor in float32", task.planted, "peer-f32", *smooth, *in_float32)
    yield quantize(
        "llmcompressor in float32, our groups", task.planted, "peer-groups-f32", *groups, *in_float32
    )


def llmcompressor(task: Task, python: Path, model: Path, out: Path, *options: str) -> float:
    return run_peer(python, SCRIPT, model, task.work / "calibration.safetensors", out, *options)


def accepted_groups(task: Task, python: Path) -> Path:
    """A file with our groups as llmcompressor's `mappings`: all, or if it fails with those, all whose sizes agree."""
    file, folds = task.work / "mappings.json", folds_of(task.work / "smoothed")
    file.write_text(json.dumps(as_mappings(folds)))
    try:
        llmcompressor(
            task, python, task.planted, task.work / "peer-all-groups", "--smooth", "--mappings", str(file)
        )
    except RuntimeError as error:
        shapes = {name: tensor.shape for name, tensor in load_file(task.planted / WEIGHTS).items()}
        fitting = {
            reader: producer
            for reader, producer in folds.items()
            if shapes[f"{reader}.weight"][1] == shapes[f"{producer}.weight"][0]
        }
        left_out = sorted({name.rpartition(".")[2] for name in folds.keys() - fitting.keys()})
        print(f"llmcompressor given all our groups fails: {error}")
        print(f"It is given those without {', '.join(left_out)}, of another size than what feeds them.\n")
        file.write_text(json.dumps(as_mappings(fitting)))
    return file


def as_mappings(folds: Folds) -> list[tuple[list[str], str]]:
    """llmcompressor's `mappings`: (the linears that read a module, the module)."""
    readers: dict[str, list[str]] = {}
    for reader, producer in folds.items():
        readers.setdefault(producer, []).append(reader)
    return [(names, producer) for producer, names in readers.items()]


def print_table(rows: Sequence[Row]) -> None:
    print("| checkpoint | KL, mean | KL, p99 | same top token | perplexity | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cost, seconds = row.cost, "" if row.seconds is None else f"{row.seconds:.1f}"
        print(
            f"| {row.name} | {cost.kl:.3e} | {cost.kl_p99:.3e} | {cost.top1_agreement:.2%} "
            f"| {cost.perplexity:.4f} | {seconds} |"
        )


def print_ratios(rows: Sequence[Row]) -> None:
    """The ratios of mean KL that the project promises, each with its bound."""
    kl = {row.name: row.cost.kl or 0.0 for row in rows}
    promises = (
        ("qlinear, naive", "qlinear", ">=", 20.0),
        ("qlinear", "qlinear, unplanted model", "<=", 1.3),
        ("qlinear", "qlinear, unplanted model, naive", "<=", 1.3),
        ("qlinear", "llmcompressor", "<=", 0.2),
        ("qlinear", "llmcompressor, our groups", "<=", 1.05),
        ("qlinear", "llmcompressor, unplanted model", "<=", 1.05),
    )
    print("\n| ratio of mean KL | measured | promised | |")
    print("|---|---:|---:|---|")
    for one, other, relation, bound in promises:
        ratio = kl[one] / kl[other]
        kept = ratio >= bound if relation == ">=" else ratio <= bound
        verdict = "kept" if kept else "**missed**"
        print(f"| {one} / {other} | {ratio:.3f} | {relation} {bound} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument("--work", type=Path, default=Path("build/peers/work"))
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens of the calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    args = parser.parse_args()
    python = environment(args.env, LLMCOMPRESSOR)
    task = Task.make(args.work.absolute(), args.samples, args.tokens)
    rows = [*rows_of_ours(task), *rows_of_llmcompressor(task, python)]
    print(f"{' '.join(LLMCOMPRESSOR)}; {task.calibration.numel()} calibration tokens, alpha 0.5;")
    print(f"{rows[0].cost.tokens} tokens evaluated by qlinear in float32, activations to absmax / 127;")
    print(f"the original's perplexity is {rows[0].cost.reference_perplexity:.4f}.\n")
    print_table(rows)
    print_ratios(rows)


if __name__ == "__main__":
    main()
