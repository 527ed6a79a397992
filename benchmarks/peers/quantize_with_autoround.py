"""AutoRound's side of the 4-bit comparison; runs in an environment of its own, which has no qlinear.

    python quantize_with_autoround.py MODEL CALIBRATION OUT [--iters 200]

MODEL: a checkpoint folder. CALIBRATION: a safetensors file with `input_ids` (n, seq_len). W4A16 in groups of 128,
symmetric, written as a float checkpoint that holds what the codes stand for: float32, so that nothing is rounded again.
Prints one line of JSON: the seconds from loading to saving, and the versions.
"""

import argparse
import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--iters", type=int, default=200)
    args = parser.parse_args()
    ids = load_file(args.calibration)["input_ids"]
    data = [
        {"input_ids": row.unsqueeze(0), "attention_mask": torch.ones_like(row).unsqueeze(0)} for row in ids
    ]
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rounder = AutoRound(
        model, tokenizer, scheme="W4A16", dataset=data, seqlen=ids.shape[1], nsamples=len(ids),
        iters=args.iters, batch_size=8, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    rounder.quantize_and_save(str(args.out), format="fake")
    seconds = time.monotonic() - began
    for made in args.out.glob("*-w4g128"):  # it makes a folder of its own inside, named after the model
        shutil.copytree(made, args.out, dirs_exist_ok=True)
        shutil.rmtree(made)
    packages = ("auto-round", "transformers", "torch")
    print(json.dumps({"seconds": seconds, "versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
