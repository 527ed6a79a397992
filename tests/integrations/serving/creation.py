"""Run in vLLM's own environment: what its config class makes of our files where its CPU build has no kernel.

    python -m tests.integrations.serving.creation FOLDER LINEAR

prints the scheme that the engine picks for a linear, and the name, dtype and shape of each parameter that it creates:
those of our tensors, or the file could not be read by a build that has the kernel.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w8a8_fp8,
    compressed_tensors_wNa16,
)
from vllm.plugins import load_general_plugins


def main(folder: str, linear: str) -> None:
    """Create one linear of a checkpoint, and print what it is made of."""
    load_general_plugins()
    stored = tensors_of(Path(folder), linear)
    weight = stored.get("weight") or stored["weight_shape"]
    engine = VllmConfig()
    engine.model_config = SimpleNamespace(
        dtype=torch.bfloat16, is_moe=False
    )  # all that choosing a kernel asks of a model
    with tempfile.NamedTemporaryFile() as file, set_current_vllm_config(engine):
        init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        initialize_model_parallel(1)
        layer = create(Path(folder), linear, weight["values"] or weight["shape"])
    scheme = getattr(layer.scheme, "inner", layer.scheme)
    created = {name: describe(parameter) for name, parameter in layer.named_parameters()}
    print(json.dumps({"scheme": type(scheme).__name__, "created": created, "stored": stored}))


def create(folder: Path, name: str, shape: list[int]) -> Any:
    """The engine's linear (out, in) under our config; where there is no kernel, any class stands in for it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization = get_quantization_config(config["quant_method"]).from_config(config)
    anything = mock.MagicMock(return_value=mock.MagicMock(__name__="none"))
    packed = mock.patch.object(compressed_tensors_wNa16, "choose_mp_linear_kernel", anything)
    with packed, mock.patch.object(compressed_tensors_w8a8_fp8, "init_fp8_linear_kernel", anything):
        sizes = {"input_size": shape[1], "output_size": shape[0], "params_dtype": torch.bfloat16}
        return ReplicatedLinear(**sizes, bias=False, quant_config=quantization, prefix=name)


def tensors_of(folder: Path, linear: str) -> dict[str, dict[str, Any]]:
    """Dtype and shape of each tensor of a linear in the file, and the values of `weight_shape`."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{linear}.")]  # noqa: SIM118
        return {name.removeprefix(f"{linear}."): describe(file.get_tensor(name)) for name in names}


def describe(tensor: Any) -> dict[str, Any]:
    """Dtype, shape, and the values of a tensor of two integers."""
    values = tensor.tolist() if tensor.numel() == 2 and str(tensor.dtype) == "torch.int64" else None
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "values": values}


if __name__ == "__main__":
    main(*sys.argv[1:])
