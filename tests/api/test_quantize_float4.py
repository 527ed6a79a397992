"""Checkpoints in NVFP4, MXFP4 and MXFP8: what they hold, that they load, and what algorithms gain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlinear
from qlinear.checkpoint.reader import Checkpoint
from qlinear.formats.scheme import SCHEMES
from qlinear.nn import QLinear

from ..support.models import edit_weights, save_model
from .test_quantize_algorithms import divergence, with_outliers

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 97, (24, 30), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NAMES = ["nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("llama"), **SIZES)
    edit_weights(folder, with_outliers)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_loads_with_the_codes_of_the_file_and_rounds_its_input(
    source: Path, tmp_path: Path, name: str
) -> None:
    result = qlinear.quantize(source, tmp_path / "out", name, calibration=IDS)
    assert len(result.layers) == 14
    model = qlinear.load(tmp_path / "out", dtype="float32")
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    assert len(layers) == 14
    assert {layer.scheme for layer in layers} == {SCHEMES[name]}
    x = torch.randn(3, 64)
    layer = layers[0]
    expected = layer._round_input(x, layer.scheme.activation) if layer.scheme.activation else x
    torch.testing.assert_close(layer(x), expected @ layer.dequantize().T, rtol=1e-5, atol=1e-5)


def test_finer_formats_lose_less(source: Path, tmp_path: Path) -> None:
    kl = {}
    for name in NAMES:
        qlinear.quantize(source, tmp_path / name, name, calibration=IDS)
        kl[name] = divergence(source, tmp_path / name)
    assert kl["nvfp4a16"] < kl["nvfp4"]
    assert kl["mxfp4a16"] < kl["mxfp4"]
    assert kl["mxfp8"] < kl["nvfp4"] < kl["mxfp4"]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_layers_that_engines_merge_share_their_global_scales(
    source: Path, tmp_path: Path, algorithm: str
) -> None:
    qlinear.quantize(source, tmp_path / "out", "nvfp4", algorithm=algorithm, calibration=IDS)
    for block in range(2):
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            for leaf in ("weight_global_scale", "input_global_scale"):
                shared = [read(tmp_path / "out", f"model.layers.{block}.{part}.{leaf}") for part in parts]
                assert all(torch.equal(scale, shared[0]) for scale in shared)
                assert shared[0].shape == (1,)
                assert shared[0].dtype == torch.float32


def read(folder: Path, name: str) -> Tensor:
    return Checkpoint.open(folder).read(name)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"])
def test_gptq_and_refinement_lose_less_than_rounding_to_nearest(
    source: Path, tmp_path: Path, name: str
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "rtn": {}, "gptq": {"algorithm": "gptq"}, "refined": {"algorithm": "gptq", "smooth": "auto", "refine": 2}
    }  # fmt: skip
    kl = {}
    for way, options in ways.items():
        qlinear.quantize(source, tmp_path / way, name, calibration=IDS, **options)
        kl[way] = divergence(source, tmp_path / way)
    assert kl["gptq"] < kl["rtn"]
    assert kl["refined"] < kl["rtn"]


def test_experts_in_a_stack_keep_a_global_scale_each(tmp_path: Path) -> None:
    source = save_model(
        tmp_path / "model",
        "qwen3_moe",
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    qlinear.quantize(source, tmp_path / "out", "nvfp4a16", smooth="off", calibration=IDS)
    folder = Checkpoint.open(tmp_path / "out")
    names = [name for name in folder.tensors if ".experts." in name and name.endswith("weight_global_scale")]
    assert len(names) == 2 * 4 * 3
    shared = {name: folder.read(name) for name in names}
    assert all(scale.shape == (1,) for scale in shared.values())
    for name, scale in shared.items():
        if "gate_proj" in name:
            assert torch.equal(scale, shared[name.replace("gate_proj", "up_proj")])
    restored = qlinear.load(tmp_path / "out", dtype="float32").state_dict()
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    # Half of a step is at most a sixth of a group's largest number, which is rarely more than 3 standard deviations.
    assert float((restored[name] - original[name]).norm()) < 0.25 * float(original[name].norm())
