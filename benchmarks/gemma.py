"""What W8A8 costs a model with Gemma 3's architecture that has outlier channels, beside llmcompressor.

    python benchmarks/gemma.py [--env FOLDER] [--work FOLDER] [--steps 600]

Gemma 3 is where tables and habits fail: its norms multiply by 1 + w, every layer has four of them of which linears read
two, queries and keys have norms of their own, values are shared by query heads, and most layers attend to a window. A
small one is trained from nothing on the text of the embedded model (scripts/train_demo.py), and
kept in the work folder. Outliers are planted as in the embedded model (docs/demo.md), by powers of two that leave the
function what it was. All rows are compared with the trained model in float32, on the held-out text.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environments import LLMCOMPRESSOR, environment, run_peer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import qlinear
from qlinear import demo
from qlinear.streaming.open_model import calibration_ids, evaluation_ids, open_model

sys.path.insert(0, str(Path(__file__).absolute().parents[1] / "scripts"))
import plant_demo
import train_demo
from demo_corpus import split

CONFIG = Gemma3TextConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=128, max_position_embeddings=1024,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
# What W8A8 costs where there is nothing to smooth: the row that the others are measured by.
BASE = "as trained, no smoothing"
OURS: dict[str, dict[str, Any]] = {
    "with outliers, no smoothing": {"smooth": "off"},
    "with outliers, qlinear's default": {},
    "with outliers, `--smooth auto`": {"smooth": "auto"},
    "with outliers, `--smooth auto --algorithm gptq`": {"smooth": "auto", "algorithm": "gptq"},
}
PEERS = {
    "with outliers, llmcompressor without smoothing": (),
    "with outliers, llmcompressor's default SmoothQuant": ("--smooth",),
}


def train(folder: Path, steps: int) -> None:
    """Train the model, and write it in float32 with the embedded model's tokenizer."""
    torch.manual_seed(train_demo.SEED)
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    documents = train_demo.encode(split()[2], tokenizer)
    held_out = train_demo.encode(demo.evaluation_text(), tokenizer)
    model = Gemma3ForCausalLM(CONFIG)
    print(f"training {model.num_parameters()} parameters", flush=True)
    train_demo.train(model, documents, held_out, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with outliers: the plan of the embedded model, for gains of 1 + w and Gemma's second norm."""
    before_mlp = ("post_attention_layernorm", "pre_feedforward_layernorm")
    plan = {name.replace(*before_mlp): slices for name, slices in plant_demo.plan_outliers(CONFIG).items()}
    gains = [name for name in plan if name.endswith("norm.weight")]
    scaled = demo.rescaled(tensors | {name: tensors[name] + 1 for name in gains}, plan)
    return scaled | {name: scaled[name] - 1 for name in gains}


def models(work: Path, steps: int) -> tuple[Path, Path]:
    """The checkpoint as it was trained, and the same with outliers."""
    trained, planted = work / "trained", work / "planted"
    if not (trained / "tokenizer.json").exists():
        train(trained, steps)
    shutil.copytree(trained, planted, dirs_exist_ok=True)
    save_file(
        plant(load_file(trained / "model.safetensors")), planted / "model.safetensors", {"format": "pt"}
    )
    return trained, planted


def checkpoints(
    trained: Path, planted: Path, work: Path, python: Path, calibration: Tensor
) -> Iterator[tuple[str, Path]]:
    """Every row's name and checkpoint, made as it is asked for."""
    out, ids = work / "out", work / "calibration.safetensors"
    save_file({"input_ids": calibration}, ids)
    qlinear.quantize(trained, out, smooth="off", calibration=calibration, overwrite=True)
    yield BASE, out
    for name, options in OURS.items():
        qlinear.quantize(planted, out, calibration=calibration, overwrite=True, **options)
        yield name, out
    for name, peer_options in PEERS.items():
        run_peer(python, "quantize_with_llmcompressor.py", planted, ids, work / "peer", *peer_options)
        yield name, work / "peer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument("--work", type=Path, default=Path("build/gemma"))
    parser.add_argument("--steps", type=int, default=600, help="of training, 2048 tokens each")
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens of the calibration text")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    trained, planted = models(work, args.steps)
    python, source = environment(args.env, LLMCOMPRESSOR), open_model(trained)
    calibration = calibration_ids("demo", source, args.samples, 512, seed=0)
    evaluation = evaluation_ids("demo", source, args.tokens, 512)
    print("| W8A8 | KL, mean | its error | ÷ first | same top token |\n|---|---:|---:|---:|---:|", flush=True)
    base = 0.0
    for name, out in checkpoints(trained, planted, work, python, calibration):
        cost = qlinear.evaluate(out, trained, data=evaluation, dtype="float32")
        base = base or cost.kl or 0.0
        print(
            f"| {name} | {cost.kl:.3e} | {cost.kl_error:.1e} | {(cost.kl or 0.0) / base:.2f} | "
            f"{cost.top1_agreement:.2%} |",
            flush=True,
        )
    # That planting changes nothing: both checkpoints in float.
    same = qlinear.evaluate(planted, trained, data=evaluation, dtype="float32")
    print(f"\nperplexity {same.reference_perplexity:.2f}; planting alone: KL {same.kl:.1e}")


if __name__ == "__main__":
    main()
