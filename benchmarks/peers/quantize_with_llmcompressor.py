"""llmcompressor's side of the comparison; runs in an environment of its own, which has no qlinear.

    python quantize_with_llmcompressor.py MODEL CALIBRATION OUT [--mappings FILE] [--dtype float32] [--no-smooth]

MODEL: a checkpoint folder. CALIBRATION: a safetensors file with `input_ids` (n, seq_len). FILE: JSON, a list of
[[names of the linears that read it], name of the producer]; without it llmcompressor's own table decides.
Prints one line of JSON: the seconds from loading to saving, and the versions that did it.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(mappings: list | None, smooth: bool) -> list:
    w8a8 = QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"])
    if not smooth:
        return [w8a8]
    return [SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings), w8a8]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mappings", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-smooth", action="store_true")
    args = parser.parse_args()
    mappings = json.loads(args.mappings.read_text()) if args.mappings else None
    ids = load_file(args.calibration)["input_ids"].tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    oneshot(
        model=model, dataset=dataset, recipe=recipe(mappings, not args.no_smooth),
        max_seq_length=len(ids[0]), num_calibration_samples=len(ids),
    )  # fmt: skip
    model.save_pretrained(args.out, save_compressed=True)
    seconds = time.monotonic() - began
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
