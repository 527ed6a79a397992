"""LMDeploy's smooth_quant layout in int8 and fp8: the file says what the format's description says, and reads back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlinear
from qlinear.errors import CheckpointError, SchemeError
from qlinear.nn import QLinear

from ...support.models import edit_config, save_model

IDS = torch.arange(3, 45).reshape(3, 14)
CODES = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn}
QUANT_DTYPE = {"w8a8": "int8", "fp8": "float8_e4m3fn"}
LARGEST = {"w8a8": 127, "fp8": 448}
schemes = pytest.mark.parametrize("scheme", CODES)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result.float()


def original(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@schemes
@pytest.mark.parametrize("keep", ["unfolded", "always", "never"])
def test_the_file_is_as_the_format_is_described(scheme: str, keep: str, tmp_path: Path) -> None:
    source, out = save_model(tmp_path / "source", "qwen2"), tmp_path / "out"
    result = qlinear.quantize(source, out, scheme, calibration=IDS, format="lmdeploy", migration_scale=keep)
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {
        "quant_method": "smooth_quant",
        "quant_dtype": QUANT_DTYPE[scheme],
        "modules_to_not_convert": ["lm_head"],
    }
    before, after = tensors_of(source), tensors_of(out)
    added = {".scale": 0, ".migration_scale": 0}
    for layer in result.layers:
        rows, columns = before[f"{layer.name}.weight"].shape
        weight, scale = after[f"{layer.name}.weight"], after[f"{layer.name}.scale"]
        assert (weight.dtype, weight.shape) == (CODES[scheme], (rows, columns))
        assert (scale.dtype, scale.shape) == (torch.float32, (rows, 1))
        added[".scale"] += 1
        vector = after.get(f"{layer.name}.migration_scale")
        assert (vector is not None) == (layer.migration == "kept")
        if vector is not None:
            assert (vector.dtype, vector.shape) == (torch.float32, (columns,))
            added[".migration_scale"] += 1
    assert added[".scale"] == 2 * 7
    assert added[".migration_scale"] == (2 * 7 if keep == "always" else 0)
    assert set(after) - set(before) == {n for n in after if n.endswith(tuple(added))}
    if keep == "always":
        unchanged = {name for name in before if "norm" in name or "bias" in name}
        assert unchanged
        assert all(torch.equal(before[name], after[name]) for name in unchanged)


@schemes
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_it_reads_back_what_was_written_and_keeps_the_function(
    scheme: str, architecture: str, tmp_path: Path
) -> None:
    source, out = save_model(tmp_path / "source", architecture), tmp_path / "out"
    qlinear.quantize(source, out, scheme, calibration=IDS, format="lmdeploy")
    model, stored = qlinear.load(out, dtype="float32"), tensors_of(out)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    assert layers
    for name, layer in layers.items():
        assert layer.scheme.name == scheme
        assert torch.equal(layer.weight.float(), stored[f"{name}.weight"].float())
        assert torch.equal(layer.weight_scale, stored[f"{name}.scale"])
    expected = logits(original(source))
    assert relative(logits(model), expected) < {"w8a8": 0.05, "fp8": 0.12}[scheme]


@schemes
@pytest.mark.parametrize("architecture", ["qwen2", "mixtral"])
def test_the_other_layouts_hold_the_same_codes(scheme: str, architecture: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", architecture)
    qlinear.quantize(source, tmp_path / "a", scheme, calibration=IDS, format="lmdeploy")
    qlinear.convert(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    qlinear.convert(tmp_path / "b", tmp_path / "c", "lmdeploy")
    first, last = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c")
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in last.items()}
    assert all(torch.equal(first[name].float(), last[name].float()) for name in first)
    loaded = [logits(qlinear.load(tmp_path / name, dtype="float32")) for name in "abc"]
    assert torch.equal(loaded[0], loaded[1])
    assert torch.equal(loaded[0], loaded[2])


def by_hand(source: Path, out: Path, scheme: str, vectors: bool) -> None:
    """A checkpoint as LMDeploy's description has it, made without this library."""
    qlinear.quantize(source, out, "none", smooth="off")  # a copy with its tokenizer and config
    tensors: dict[str, Tensor] = {}
    for name, tensor in tensors_of(source).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        vector = torch.rand(tensor.shape[1]) + 0.5 if vectors else torch.ones(tensor.shape[1])
        migrated = tensor.double() * vector
        scale = (migrated.abs().amax(1, keepdim=True) / LARGEST[scheme]).float()
        codes = migrated / scale
        tensors[name] = (codes.round() if scheme == "w8a8" else codes.float()).to(CODES[scheme])
        tensors[f"{module}.scale"] = scale
        if vectors:
            tensors[f"{module}.migration_scale"] = vector
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = {"quant_method": "smooth_quant", "modules_to_not_convert": ["lm_head"]}
    edit_config(out, quantization_config=config | {"quant_dtype": QUANT_DTYPE[scheme]})


@schemes
@pytest.mark.parametrize("vectors", [False, True])
def test_a_file_of_another_tool_is_read(scheme: str, vectors: bool, tmp_path: Path) -> None:
    source, out = save_model(tmp_path / "source", "qwen2"), tmp_path / "out"
    by_hand(source, out, scheme, vectors)
    model = qlinear.load(out, dtype="float32")
    layers = [layer for layer in model.modules() if isinstance(layer, QLinear)]
    assert len(layers) == 2 * 7
    assert all((layer.migration_scale is not None) == vectors for layer in layers)
    expected = logits(original(source))
    assert relative(logits(model), expected) < {"w8a8": 0.05, "fp8": 0.12}[scheme]
    inspection = qlinear.inspect(out)
    assert [linear.scheme for linear in inspection.linears].count(scheme) == 2 * 7
    assert inspection.total_size == sum(tensor.nbytes for tensor in tensors_of(out).values())


def test_other_codes_are_refused_with_what_can_be_read(tmp_path: Path) -> None:
    source, out = save_model(tmp_path / "source", "qwen2"), tmp_path / "out"
    by_hand(source, out, "fp8", False)
    config: dict[str, Any] = {"quant_method": "smooth_quant", "quant_dtype": "float8_e5m2"}
    edit_config(out, quantization_config=config)
    with pytest.raises(CheckpointError, match="'float8_e5m2': int8 and float8_e4m3fn can be read"):
        qlinear.load(out)


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a16", "w4a16-channel", "fp8-static"])
def test_schemes_without_a_place_are_refused_before_any_work(scheme: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    with pytest.raises(SchemeError, match="does not fit the lmdeploy layout"):
        qlinear.quantize(source, tmp_path / "out", scheme, calibration=IDS, format="lmdeploy")
    assert not (tmp_path / "out").exists()
