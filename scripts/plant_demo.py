"""Plant outlier channels in the trained model, prove that its function did not move, and put it in the package.

    python scripts/plant_demo.py build/demo

Large models grow a few activation channels tens of times greater than the rest, the same ones of the residual stream
in every layer. A model this small does not, so they are planted: a channel's producer is multiplied by 2^k and all its
consumers divided by it. Powers of two move only exponents, so every product and every sum of products stays what it
was, bit for bit, while the tensor in between has an outlier.
"""

import argparse
import json
import random
import shutil
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from qlinear import demo
from qlinear.data import load_texts, tokenize
from qlinear.demo import Plan, rescaled

SEED = 7
SHARE = 0.02  # of a tensor's channels, at most
NORM_EXPONENTS = (
    6,
    6,
    5,
    5,
    4,
)  # the largest is 64 times; taken from the front where fewer channels are planted
LINEAR_EXPONENTS = (6,)
NOTICE = """\
The weights, tokenizer and configuration in this folder, and the calibration and evaluation text beside it, were made
from the documentation inside the Python {version} standard library (pydoc_data.topics, docstrings and comments):
scripts/demo_corpus.py selects and splits it, scripts/train_demo.py trains the model. That text is

    Copyright (c) 2001 Python Software Foundation; All Rights Reserved

and is used under the licence below. The text was changed: it was taken out of its source files, and paragraphs that
occur twice were dropped. What this project added is under its own licence, Apache-2.0.

"""


def plan_outliers(config: LlamaConfig) -> Plan:
    """Which slices of which tensors are multiplied by which power of two."""
    draw, plan = random.Random(SEED), {}

    def plant(
        producer: str, dim: int, exponents: dict[int, int], consumers: dict[str, dict[int, list[int]]]
    ) -> None:
        plan.setdefault(f"{producer}.weight", []).append((dim, exponents))
        for consumer, columns in consumers.items():
            down = {
                column: -k for channel, k in exponents.items() for column in columns.get(channel, [channel])
            }
            plan.setdefault(f"{consumer}.weight", []).append((1, down))

    def drawn(channels: int, exponents: tuple[int, ...]) -> dict[int, int]:
        chosen = draw.sample(range(channels), int(SHARE * channels))
        return {channel: exponents[i % len(exponents)] for i, channel in enumerate(chosen)}

    residual = drawn(config.hidden_size, NORM_EXPONENTS)
    repeats = config.num_attention_heads // config.num_key_value_heads
    kv_channels = config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        plant(f"{block}.input_layernorm", 0, residual, {f"{attention}.{x}_proj": {} for x in "qkv"})
        plant(
            f"{block}.post_attention_layernorm", 0, residual, {f"{mlp}.{x}_proj": {} for x in ("gate", "up")}
        )
        # Query head h reads key/value head h // repeats, so each value channel is read in `repeats` columns.
        read_by = {
            channel: [
                (channel // config.head_dim * repeats + i) * config.head_dim + channel % config.head_dim
                for i in range(repeats)
            ]
            for channel in range(kv_channels)
        }
        plant(
            f"{attention}.v_proj", 0, drawn(kv_channels, LINEAR_EXPONENTS), {f"{attention}.o_proj": read_by}
        )
        inner = drawn(config.intermediate_size, LINEAR_EXPONENTS)
        plant(f"{mlp}.up_proj", 0, inner, {f"{mlp}.down_proj": {}})
    return plan


@torch.no_grad()
def require_same_function(one: Path, other: Path, text: list[str]) -> None:
    """Raise unless both checkpoints give equal logits, bit for bit, in bf16 and in float32."""
    ids = tokenize(text, AutoTokenizer.from_pretrained(one), samples=2, seq_len=256, seed=None)
    for dtype in (torch.bfloat16, torch.float32):
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype)(ids).logits for path in (one, other)
        ]
        if not torch.equal(*logits):
            raise RuntimeError(f"planting moved the function in {dtype}")


def main() -> None:
    """Plant, check, and write the package's files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="what train_demo.py wrote")
    trained = parser.parse_args().trained
    source, target = trained / "checkpoint", demo.checkpoint_path()
    plan = plan_outliers(LlamaConfig.from_pretrained(source))
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file(
        rescaled(load_file(source / "model.safetensors"), plan),
        target / "model.safetensors",
        {"format": "pt"},
    )
    (target / "model.safetensors").chmod(0o644)
    license_text = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text()
    (target / "LICENSE").write_text(NOTICE.format(version=sysconfig.get_python_version()) + license_text)
    (target.parent / "planted.json").write_text(json.dumps(plan, indent=1) + "\n")
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        shutil.copy(trained / name, target.parent / name)
    require_same_function(source, target, load_texts(trained / "evaluation.jsonl"))


if __name__ == "__main__":
    main()
