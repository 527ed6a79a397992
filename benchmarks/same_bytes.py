"""Whether two versions of qlinear write the same bytes: run before and after a change that must change nothing.

    python benchmarks/same_bytes.py BEFORE AFTER [JOB ...]

BEFORE and AFTER are checkouts. Each job runs once in each, in a process of its own, on the embedded model or on a tiny
random model of another architecture; one job is killed after its first finished block and resumed. Then every file of
the two results is compared. Exits with 1 where one differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma3Text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Phi3": {"pad_token_id": 0},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}
GPTQ = {
    "scheme": "w4a16-g32",
    "algorithm": "gptq",
    "smooth": "auto",
    "refine": 1,
    "samples": 8,
    "seq_len": 64,
}
FEW = {"samples": 8, "seq_len": 64}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo-auto": ("demo", {"smooth": "auto", "samples": 16}),
    "demo-default": ("demo", {}),
    "demo-gptq-refine": ("demo", GPTQ),
    "demo-static": ("demo", {"scheme": "w8a8-static-asym", "algorithm": "gptq", "samples": 16}),
    "demo-awq": ("demo", {"scheme": "w4a16-g32", "algorithm": "awq", "samples": 8}),
    "demo-rtn-only": ("demo", {"scheme": "fp8", "smooth": "off"}),
    "demo-keep-worst": ("demo", {"keep_worst": 3, "samples": 8, "scheme_for": {"*down_proj": "w8a16"}}),
    "demo-killed": ("demo", {"smooth": "auto", "samples": 16, "algorithm": "gptq"}),
    **{f"{name}-auto": (name, FEW | {"smooth": "auto"}) for name in MODELS},
    **{f"{name}-gptq": (name, GPTQ) for name in MODELS},
    "Llama-lmdeploy-kept": ("Llama", FEW | {"format": "lmdeploy", "migration_scale": "always"}),
    "Gemma3Text-qlinear-kept": ("Gemma3Text", FEW | {"format": "qlinear", "migration_scale": "unfolded"}),
}
KILLED = "demo-killed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("jobs", nargs="*")
    arguments = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_models(work)
        for job in arguments.jobs or JOBS:
            before, after = run(job, arguments.before, work / "a"), run(job, arguments.after, work / "b")
            unequal = difference(before, after)
            differ += bool(unequal)
            print(f"{job:26} {'equal' if not unequal else 'DIFFERS: ' + ', '.join(unequal)}", flush=True)
    return int(differ > 0)


def make_models(work: Path) -> None:
    """Save a tiny random model of each architecture in bfloat16, with the embedded model's tokenizer."""
    import shutil

    import torch
    import transformers

    import qlinear.demo as demo

    for name, more in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | more)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.to(torch.bfloat16).save_pretrained(work / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo.checkpoint_path() / file, work / name)


def run(job: str, checkout: Path, folder: Path) -> Path:
    """Do a job with the code of a checkout; returns its output folder."""
    model, options = JOBS[job]
    out = folder / job
    source = model if model == "demo" else str(folder.parent / model)
    code = f"import qlinear; qlinear.quantize({source!r}, {str(out)!r}, **{options!r}, dtype='float32')"
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve() / "src"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-W", "ignore", "-c", code]
    if job == KILLED:
        kill_after_a_block(subprocess.Popen(command, env=environment), out)
    subprocess.run(command, env=environment, check=True)
    return out


def kill_after_a_block(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Kill a job as soon as its journal names a finished block."""
    journal = out / ".qlinear" / "journal.json"
    while process.poll() is None and not (journal.is_file() and json.loads(journal.read_text())["blocks"]):
        time.sleep(0.01)
    process.kill()
    process.wait()


def difference(a: Path, b: Path) -> list[str]:
    """The names of the files that differ, or that one result lacks."""
    files = {file.relative_to(side) for side in (a, b) for file in side.rglob("*") if file.is_file()}
    return sorted(str(file) for file in files if content(a / file) != content(b / file))


def content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
