"""What is served: each model kind in each scheme and layout, quantized here and scored by our own runtime.

    folded           --format compressed-tensors: no vector is left
    kept-unfolded    --format qlinear: vectors stay where nothing can take them (only the kind `unfolded` has any)
    kept-always      --format qlinear --migration-scale always: every linear keeps its vector
    lmdeploy, awq    the other layouts that the engine reads

Run as `python -m tests.integrations.serving.cases FOLDER`; it leaves FOLDER/cases.json for the engine.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import qlinear
from qlinear.formats.scheme import SCHEMES

from .sources import KINDS, make_source

LAYOUTS: dict[str, dict[str, Any]] = {
    "folded": {"format": "compressed-tensors"},
    "kept-unfolded": {"format": "qlinear"},
    "kept-always": {"format": "qlinear", "migration_scale": "always"},
    "lmdeploy": {"format": "lmdeploy", "migration_scale": "never"},
    "lmdeploy-kept": {"format": "lmdeploy", "migration_scale": "always"},
    "awq": {"format": "awq"},
}


def combinations(kind: str) -> Iterator[tuple[str, str]]:
    """The (scheme, layout) pairs that a kind is served in."""
    for scheme in SCHEMES:
        yield scheme, "folded"
        if kind == "unfolded" or scheme == "w8a8":
            yield scheme, "kept-unfolded"
        yield scheme, "kept-always"
    yield "none", "kept-always"
    yield from ((scheme, layout) for scheme in ("w8a8", "fp8") for layout in ("lmdeploy", "lmdeploy-kept"))
    yield from (("w4a16", "awq"), ("w4a16-asym", "awq"))


def dtype_of(scheme: str) -> str:
    """The engine's 4-bit kernel knows bfloat16 alone; float32 shows best that nothing else differs."""
    return "bfloat16" if scheme.startswith("w4") else "float32"


def make_case(kind: str, scheme: str, layout: str, model: str, root: Path) -> dict[str, Any]:
    """Quantize, and score by our own runtime; a refusal of ours is noted."""
    name, ids = f"{kind}.{scheme}.{layout}", json.loads((root / f"{kind}.json").read_text())
    case = {
        "name": name,
        "folder": str(root / name),
        "ids": str(root / f"{kind}.json"),
        "dtype": dtype_of(scheme),
    }
    calibration: Any = "demo" if kind == "demo" else torch.tensor(ids)
    try:
        qlinear.quantize(
            model, root / name, scheme, calibration=calibration, samples=16, seq_len=64, overwrite=True,
            **LAYOUTS[layout],
        )  # fmt: skip
    except qlinear.QLinearError as error:
        return case | {"refused": str(error)}
    return case | {"perplexity": perplexity(root / name, torch.tensor(ids), case["dtype"])}


@torch.no_grad()
def perplexity(folder: Path, ids: torch.Tensor, dtype: str) -> float:
    """Of token ids (n, seq_len) by our own runtime."""
    logits = qlinear.load(folder, dtype=dtype)(ids).logits.float()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).double().exp())


def make_cases(root: Path) -> list[dict[str, Any]]:
    """Every case, below a folder."""
    made = []
    for kind in KINDS:
        model = make_source(kind, root)
        made += [make_case(kind, *pair, model, root) for pair in combinations(kind)]
    (root / "cases.json").write_text(json.dumps(made, indent=1))
    return made


if __name__ == "__main__":
    make_cases(Path(sys.argv[1]))
