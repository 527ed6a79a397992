"""Inputs after public bug reports of this field: each is done right, or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import qlinear
from qlinear.errors import CheckpointError, DataError
from qlinear.streaming.open_model import model_name
from qlinear.streaming.plain_linear import is_plain_linear

from ..support.models import edit_weights, save_model

IDS = torch.arange(3, 67).view(2, 32)
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = WIDE | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {"intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1}


def quantization_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("format", ["compressed-tensors", "lmdeploy", "awq", "qlinear"])
def test_routers_that_are_no_linears_stand_among_what_stays_in_float(format: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", **EXPERTS)
    scheme = "w4a16-g32" if format == "awq" else "w8a8"
    qlinear.quantize(source, tmp_path / "out", scheme, smooth="off", format=format)
    config = quantization_config(tmp_path / "out")
    floats = config["ignore"] if "ignore" in config else config["modules_to_not_convert"]
    assert floats == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]


def test_stacked_experts_that_stay_in_float_are_named_for_engines_and_for_the_user(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama4_text", **WIDE, **LLAMA4)
    result = qlinear.quantize(source, tmp_path / "out", smooth="off")
    ignore = quantization_config(tmp_path / "out")["ignore"]
    experts = "model.layers.1.feed_forward.experts"
    assert {experts, f"{experts}.gate_up_proj", f"re:{experts}.".replace(".", "\\.") + ".*"} <= set(ignore)
    assert sum("feed_forward.experts.gate_up_proj" in warning for warning in result.warnings) == 1
    # A list of all that stays in float must not name what is quantized.
    assert not {layer.name for layer in result.layers} & set(ignore)


def test_experts_of_unused_layers_are_named_by_a_pattern(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", **WIDE)
    edit_weights(source, lambda t: t.update({"mtp.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 8)}))
    result = qlinear.quantize(source, tmp_path / "out", smooth="off")
    ignore = quantization_config(tmp_path / "out")["ignore"]
    assert {"mtp.layers.0.mlp.experts", "re:mtp\\.layers\\.0\\.mlp\\.experts\\..*"} <= set(ignore)
    assert any(warning.startswith("mtp.*: 1 weights") for warning in result.warnings)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS).logits
    return output


def test_w4a8_loads_in_transformers(tmp_path: Path) -> None:
    """Both round tokens to int8, on steps that differ slightly, so they differ by at most the two roundings."""
    source = save_model(
        tmp_path / "source", **WIDE | {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    )
    for scheme in ("w4a8", "w4a16"):
        qlinear.quantize(source, tmp_path / scheme, scheme, smooth="off")
    unrounded, ours = (logits(qlinear.load(tmp_path / scheme)) for scheme in ("w4a16", "w4a8"))
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "w4a8", dtype=torch.float32))
    assert (theirs - ours).norm() < 2 * (ours - unrounded).norm()


def test_schemes_of_experts_and_attention_may_differ_in_transformers(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", **EXPERTS)
    qlinear.quantize(source, tmp_path / "out", "w4a16-g32", smooth="off", scheme_for={"*self_attn*": "w8a16"})
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(theirs, logits(qlinear.load(tmp_path / "out")), rtol=1e-4, atol=1e-4)


def test_a_model_is_loaded_with_its_generation_config(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 6], "max_new_tokens": 7}')
    qlinear.quantize(source, tmp_path / "out", smooth="off")
    for folder in (source, tmp_path / "out"):
        config: Any = qlinear.load(folder).generation_config
        assert (config.eos_token_id, config.max_new_tokens) == ([5, 6], 7)
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        qlinear.load(source)


@pytest.mark.parametrize("format", ["compressed-tensors", "lmdeploy", "awq"])
@pytest.mark.parametrize(
    "name",
    [
        "vision.norm.scale",
        "vision.norm.scales",
        "vision.norm.weight_scale",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_tensors_that_the_model_lacks_are_not_read(name: str, format: str, tmp_path: Path) -> None:
    source, scheme = save_model(tmp_path / "source", **WIDE), "w4a16-g32" if format == "awq" else "w8a8"
    qlinear.quantize(source, tmp_path / "plain", scheme, smooth="off", format=format)
    other = shutil.copytree(source, tmp_path / "other")
    edit_weights(
        other, lambda tensors: tensors.update({name: torch.ones(64), "vision.norm.weight": torch.ones(64)})
    )
    qlinear.quantize(other, tmp_path / "out", scheme, smooth="off", format=format)
    with torch.no_grad():
        expected, actual = (qlinear.load(tmp_path / f)(input_ids=IDS).logits for f in ("plain", "out"))
    assert torch.equal(actual, expected)


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, -1)


class Spelled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_linears_that_compute_a_product_are_replaced(dtype: torch.dtype, device: str) -> None:
    options: Any = {"dtype": dtype, "device": device}
    assert is_plain_linear(nn.Linear(8, 8, **options))
    assert is_plain_linear(Spelled(8, 8, **options))
    assert not is_plain_linear(Grouped(8, 8, **options))
    assert not is_plain_linear(nn.Identity())


def test_a_classifier_is_refused_for_want_of_a_head(tmp_path: Path) -> None:
    config = LlamaConfig(**WIDE, vocab_size=97, num_hidden_layers=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="no language model head"):
        qlinear.quantize(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_have_names_wherever_they_are_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    assert model_name(folder) == "org/name"
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert (model_name("."), model_name("../plain"), model_name("org/name")) == ("plain", "plain", "org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_name("~/plain") == "plain"


def test_a_result_goes_to_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "source")
    qlinear.quantize("~/source", "~/out", smooth="off")
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_adapter_is_named_and_left_out(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    (source / "lora").mkdir()
    for folder in (source, source / "lora"):
        (folder / "adapter_config.json").write_text("{}")
        save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    result = qlinear.quantize(source, tmp_path / "out", smooth="off")
    assert [warning.partition(":")[0] for warning in result.warnings] == [
        "adapter in the folder itself", "adapter in lora"
    ]  # fmt: skip
    assert not list((tmp_path / "out").rglob("adapter*"))


@pytest.mark.parametrize("options", [{"tokens": 1}, {"tokens": 0}, {"seq_len": 1}, {"data": IDS[:, :1]}])
def test_one_token_predicts_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2"):
        qlinear.evaluate(save_model(tmp_path / "source"), **{"data": "random"} | options)


def test_deepseek_s_router_stays_in_float(tmp_path: Path) -> None:
    experts = {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    }
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    heads = {"q_lora_rank": 32, "kv_lora_rank": 32} | dict.fromkeys(
        ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16
    )
    source = save_model(tmp_path / "source", "deepseek_v3", **WIDE | experts | groups | heads)
    qlinear.quantize(source, tmp_path / "out", smooth="off")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    ignore = quantization_config(tmp_path / "out")["ignore"]
    matrices = [key for key, tensor in stored.items() if tensor.is_floating_point() and tensor.dim() > 1]
    floats = {
        k.removesuffix(".weight") for k in matrices if not k.endswith(("_scale", "embed_tokens.weight"))
    }
    assert floats == set(ignore)
