"""The embedded model and its text, so that the first command needs no download, no account and no data.

The model is a small Llama with grouped-query attention, trained on the documentation that ships inside Python. The
calibration and evaluation texts were not in its training set. Large models have outlier channels, small ones do not;
so outliers are planted: some channels are scaled by exact powers of two, and the scaling is undone elsewhere
(docs/demo.md says how and why). `write_unplanted` writes the model as it was trained.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import load_texts

_HERE = Path(__file__).parent
_WEIGHTS = "model.safetensors"

# By tensor: a list of (dim, {index: exponent}). The slice at that index of that dim was multiplied by 2^exponent.
Plan = Mapping[str, list[tuple[int, Mapping[int, int]]]]


def checkpoint_path() -> Path:
    """The folder of the embedded checkpoint: bfloat16, in Hugging Face's format."""
    return _HERE / "checkpoint"


def calibration_text() -> list[str]:
    """Documents to calibrate on, about 78,000 tokens. The three sets (training too) share no paragraph."""
    return _texts("calibration")


def evaluation_text() -> list[str]:
    """Documents to evaluate on, about 37,000 tokens. The three sets (training too) share no paragraph."""
    return _texts("evaluation")


def _texts(name: str) -> list[str]:
    return [text for text in load_texts(_HERE / f"{name}.jsonl") if isinstance(text, str)]


def planted() -> Plan:
    """The exponents of the planted outliers."""
    stored = json.loads((_HERE / "planted.json").read_text())
    return {
        name: [
            (dim, {int(index): exponent for index, exponent in slices.items()}) for dim, slices in scalings
        ]
        for name, scalings in stored.items()
    }


def rescaled(tensors: Mapping[str, Tensor], plan: Plan, sign: int = 1) -> dict[str, Tensor]:
    """The tensors with the slices of a plan multiplied by 2^(sign · exponent), which is exact in bfloat16 and float32.

    sign: 1 plants outliers, -1 removes them. Tensors that the plan does not name are returned unchanged.
    """
    result = dict(tensors)
    for name, scalings in plan.items():
        for dim, slices in scalings:
            exponents = torch.zeros(result[name].shape[dim])
            exponents[list(slices)] = torch.tensor([float(sign * exponent) for exponent in slices.values()])
            shape = [-1 if axis == dim else 1 for axis in range(result[name].dim())]
            factor = exponents.exp2().to(result[name].dtype)
            result[name] = result[name] * factor.view(shape)
    return result


def write_unplanted(folder: str | Path) -> Path:
    """Write the embedded checkpoint without its planted outliers into a folder; returns the folder.

    Its outputs are the same, bit for bit, in bfloat16 and float32. Existing files are replaced.
    """
    folder = Path(folder)
    shutil.copytree(checkpoint_path(), folder, dirs_exist_ok=True)
    tensors = rescaled(load_file(checkpoint_path() / _WEIGHTS), planted(), sign=-1)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return folder
