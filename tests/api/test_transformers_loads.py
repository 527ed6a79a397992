"""What is written in the compressed-tensors layout loads in plain transformers and gives our numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlinear
from qlinear.checkpoint.layouts import compressed_tensors as layout
from qlinear.checkpoint.layouts.base import QuantizedLinear
from qlinear.checkpoint.output_dir import write_atomically
from qlinear.checkpoint.reader import Checkpoint
from qlinear.checkpoint.writer import ShardWriter
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat
from qlinear.streaming.meta_model import build_meta_model
from qlinear.streaming.weight_map import WeightMap

from ..support.many_architectures import save
from ..support.models import save_model

# Asymmetric packed weights are left out: when it loads a model, compressed-tensors 0.20 expects their zero points
# unpacked, though it writes them packed, as vLLM reads them. That its decompression reads ours is tested elsewhere.
WEIGHT_ONLY = [SCHEMES["w8a16"], Scheme("w4a16-g16", TensorFormat("int4", "group", group_size=16))]


def write_quantized(source: Path, out: Path, scheme: Scheme) -> PreTrainedModel:
    """Round every linear of the blocks to nearest and write the result; returns the model it stands for."""
    checkpoint = Checkpoint.open(source)
    model = build_meta_model(source)
    names = WeightMap(model, checkpoint)
    names.materialize("")
    writer = ShardWriter(out, 40_000)
    written = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = quantize_tensor(module.weight, scheme.weight)
            module.weight.data.copy_(weight.dequantize())
            for key, tensor in layout.pack(
                names.source_module(name), QuantizedLinear(scheme, weight)
            ).items():
                writer.add(key, tensor)
            written.update(names.sources(f"{name}.weight"))
    for key in checkpoint.tensors.keys() - written:
        writer.copy(key, checkpoint)
    writer.finish()
    config = checkpoint.config | {"quantization_config": layout.quantization_config(scheme, ["lm_head"])}
    write_atomically(out / "config.json", json.dumps(config).encode())
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).reshape(2, 10)).logits


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=lambda scheme: scheme.name)
def test_weight_only_logits_are_those_of_the_dequantized_model(
    architecture: str, scheme: Scheme, tmp_path: Path
) -> None:
    save(architecture, tmp_path / "source")
    model = write_quantized(tmp_path / "source", tmp_path / "out", scheme)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
def test_dynamic_int8_logits_are_near_those_of_the_dequantized_model(scheme: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "source")
    model = write_quantized(tmp_path / "source", tmp_path / "out", SCHEMES[scheme])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(model)
    assert (logits(loaded) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4a16", "mxfp4", "mxfp8"])
def test_formats_with_stored_scales_give_our_weights_and_logits(name: str, tmp_path: Path) -> None:
    """In bfloat16, which that package decompresses these formats in. It rounds NVFP4's inputs in bfloat16, too."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 2}
    save_model(tmp_path / "source", **sizes)
    ids = torch.arange(3, 63).view(2, 30)
    qlinear.quantize(tmp_path / "source", tmp_path / "out", name, calibration=ids)
    ours = qlinear.load(tmp_path / "out", dtype="bfloat16").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    expected = logits(ours).float()
    assert float((logits(theirs).float() - expected).norm()) < 0.02 * float(expected.norm())
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = ours.get_submodule(module).dequantize().bfloat16()
        assert torch.equal(theirs.get_submodule(module).weight, weight)
