"""llmcompressor's side of the comparisons; runs in an environment of its own, which has no qlinear.

    python quantize_with_llmcompressor.py MODEL CALIBRATION OUT [--scheme W8A8] [--algorithm rtn] [--smooth]
        [--mappings FILE] [--dtype float32]

MODEL: a checkpoint folder. CALIBRATION: a safetensors file with `input_ids` (n, seq_len). --smooth: SmoothQuant at 0.5
before the algorithm. FILE: JSON, a list of [[names of the linears that read it], name of the producer]; without it
llmcompressor's own table decides what is smoothed. Everything else is as llmcompressor has it by default.
Prints one line of JSON: the seconds from loading to saving, and the versions that did it.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ALGORITHMS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}


def recipe(args: argparse.Namespace) -> list:
    rounding = ALGORITHMS[args.algorithm](scheme=args.scheme, targets="Linear", ignore=["lm_head"])
    if not args.smooth:
        return [rounding]
    mappings = json.loads(args.mappings.read_text()) if args.mappings else None
    return [SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings), rounding]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--scheme", default="W8A8")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="rtn")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--mappings", type=Path)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    ids = load_file(args.calibration)["input_ids"].tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    oneshot(
        model=model, dataset=dataset, recipe=recipe(args),
        max_seq_length=len(ids[0]), num_calibration_samples=len(ids),
    )  # fmt: skip
    model.save_pretrained(args.out, save_compressed=True)
    seconds = time.monotonic() - began
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
