"""Run in vLLM's own environment: the log-probabilities that the engine gives to the tokens of each case.

    RANKS=2 python -m tests.integrations.serving.engine cases.json results.jsonl

One process serves all cases one after another, since starting it takes longer than serving a small model; a rank beyond
the first is a worker process that the engine starts for each case. Results are lines: {"name", "ranks", "perplexity",
"layers": {layer: what runs it}} or {"name", "ranks", "error"}.
"""

import gc
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `layer_schemes` is sent to the workers as code
if os.environ.get("RANKS") == "2":
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"

from vllm import LLM, SamplingParams

RANKS = int(os.environ.get("RANKS", "1"))


def main(cases_file: str, results_file: str) -> None:
    """Serve every case of a file and append its result to another."""
    for case in json.loads(Path(cases_file).read_text()):
        if "refused" in case:
            continue
        result = {"name": case["name"], "ranks": RANKS} | _result(case)
        with Path(results_file).open("a") as file:
            file.write(json.dumps(result) + "\n")


def _result(case: dict[str, Any]) -> dict[str, Any]:
    try:
        engine = start(case["folder"], case["dtype"])
    except Exception as error:  # whatever the engine refuses with is the result
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        ids = json.loads(Path(case["ids"]).read_text())
        return {"perplexity": perplexity(engine, ids), "layers": engine.apply_model(layer_schemes)[0]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del engine
        gc.collect()


def start(folder: str, dtype: str) -> LLM:
    """The engine on a checkpoint, over as many ranks as RANKS says."""
    return LLM(
        folder, dtype=dtype, enforce_eager=True, tensor_parallel_size=RANKS, max_model_len=300, max_num_seqs=8,
        seed=0, enable_prefix_caching=False,
    )  # fmt: skip


def perplexity(engine: LLM, ids: list[list[int]]) -> float:
    """Of sequences of token ids, by the engine's prompt log-probabilities."""
    wanted = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0)
    outputs = engine.generate([{"prompt_token_ids": row} for row in ids], wanted, use_tqdm=False)
    losses = [
        -scores[token].logprob
        for output, row in zip(outputs, ids, strict=True)
        for token, scores in zip(row[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


def layer_schemes(model: Any) -> dict[str, str]:
    """What runs each linear and mixture of the first block: method, scheme, kernel, and whether it divides."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "quant_method") and (".layers.0." in name or ".layers.1." in name):
            scheme = getattr(layer, "scheme", None)
            inner = getattr(scheme, "inner", scheme)
            kernel = getattr(inner, "kernel", None)
            parts = [type(x).__name__ for x in (layer.quant_method, inner, kernel) if x is not None]
            divides = getattr(layer, "migration_scale", None) is not None
            found[name] = " ".join([*parts, *(["divided"] if divides else [])])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
