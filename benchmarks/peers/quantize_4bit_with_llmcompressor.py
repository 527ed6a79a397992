"""llmcompressor's side of the 4-bit comparison; runs in an environment of its own, which has no qlinear.

    python quantize_4bit_with_llmcompressor.py MODEL CALIBRATION OUT [--scheme W4A16] [--algorithm gptq] [--dtype auto]

MODEL: a checkpoint folder. CALIBRATION: a safetensors file with `input_ids` (n, seq_len). Algorithms: gptq, awq, rtn,
each with llmcompressor's defaults; awq pins memory, so 0.14 cannot run it without an accelerator. Prints one line
of JSON: the seconds from loading to saving, and the versions.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(scheme: str, algorithm: str) -> list:
    what = {"scheme": scheme, "targets": "Linear", "ignore": ["lm_head"]}
    return {
        "gptq": lambda: [GPTQModifier(**what)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**what)],
        "rtn": lambda: [QuantizationModifier(**what)],
    }[algorithm]()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--algorithm", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    ids = load_file(args.calibration)["input_ids"].tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    oneshot(
        model=model, dataset=dataset, recipe=recipe(args.scheme, args.algorithm),
        max_seq_length=len(ids[0]), num_calibration_samples=len(ids),
    )  # fmt: skip
    model.save_pretrained(args.out, save_compressed=True)
    seconds = time.monotonic() - began
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
