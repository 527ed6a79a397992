"""A model loaded block by block equals that of from_pretrained, and converts back to the same file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from qlinear.checkpoint.reader import Checkpoint
from qlinear.errors import CheckpointError
from qlinear.streaming.meta_model import build_meta_model
from qlinear.streaming.weight_map import WeightMap

from ..support.many_architectures import ARCHITECTURES, save

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        return model(input_ids=ids).logits


def parts(model: PreTrainedModel) -> list[str]:
    """Modules that hold all parameters between them, each block one of them."""
    parts: list[str] = []
    for name, module in model.named_modules():
        is_covered = any(name.startswith(f"{part}.") for part in parts)
        if not is_covered and (
            not list(module.children()) or type(module).__name__.endswith(("Layer", "Block"))
        ):
            parts.append(name)
    return parts


def filled(folder: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, WeightMap]:
    model = build_meta_model(folder, dtype)
    names = WeightMap(model, Checkpoint.open(folder))
    for part in parts(model):
        names.materialize(part)
    return model, names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_from_pretrained(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = save(architecture, tmp_path, dtype, shard="20KB" if dtype == torch.bfloat16 else "5GB")
    model, names = filled(tmp_path)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(reference))
    assert not names.unused


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_source_is_cast_to_the_model_s_dtype(architecture: str, tmp_path: Path) -> None:
    save(architecture, tmp_path, torch.float32)
    model, _ = filled(tmp_path, torch.bfloat16)
    reference = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="eager")
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_go_back_to_the_tensors_they_came_from(architecture: str, tmp_path: Path) -> None:
    save(architecture, tmp_path)
    model, names = filled(tmp_path)
    back = names.to_sources(dict(model.named_parameters()))
    original = load_file(tmp_path / "model.safetensors")
    parameters = {source for name, _ in model.named_parameters() for source in names.sources(name)}
    assert back.keys() == parameters
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_released_parts_can_be_loaded_again_into_the_same_memory(architecture: str, tmp_path: Path) -> None:
    reference = save(architecture, tmp_path)
    model, names = filled(tmp_path)
    for part in parts(model):
        addresses = {p.data_ptr() for p in model.get_submodule(part).parameters()}
        names.release(part)
        names.materialize(part)
        if architecture != "qwen3":  # its embedding is in use as the output head
            assert {p.data_ptr() for p in model.get_submodule(part).parameters()} == addresses
    names.release("")
    assert all(parameter.is_meta for parameter in model.parameters())
    names.materialize("")
    assert torch.equal(logits(model), logits(reference))


def test_a_released_block_takes_nothing_from_one_that_is_in_use(tmp_path: Path) -> None:
    reference = save("llama", tmp_path)
    model, names = filled(tmp_path)
    names.release("model.layers.0")
    names.materialize("model.layers.0")
    assert torch.equal(logits(model), logits(reference))


def test_a_part_may_be_a_single_parameter(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model = build_meta_model(tmp_path)
    names = WeightMap(model, Checkpoint.open(tmp_path))
    names.materialize("model.norm.weight")
    assert [n for n, p in model.named_parameters() if not p.is_meta] == ["model.norm.weight"]
    names.release("model.norm.weight")
    assert model.model.norm.weight.is_meta


def test_a_block_whose_linears_were_replaced_can_be_released(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model, names = filled(tmp_path)
    model.model.layers[0].mlp = torch.nn.Identity()
    names.release("model.layers.0")
    assert all(parameter.is_meta for parameter in model.model.layers[0].parameters())


def test_a_tied_weight_is_read_once_and_released_with_its_last_place(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    model = build_meta_model(tmp_path)
    names = WeightMap(model, Checkpoint.open(tmp_path))
    names.materialize("model.embed_tokens")
    assert model.lm_head.weight.is_meta
    names.materialize("lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names.release("model.embed_tokens")
    assert model.model.embed_tokens.weight.is_meta
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_weight_that_the_file_holds_twice_is_untied_if_it_differs(same: bool, tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + (0 if same else 1)}, tmp_path / "model.safetensors")
    model, _ = filled(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    assert torch.equal(model.lm_head.weight, embedding + (0 if same else 1))


def test_tensors_that_the_model_does_not_use_are_listed(tmp_path: Path) -> None:
    reference = save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "vision.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    model, names = filled(tmp_path)
    assert names.unused == ["vision.weight"]
    assert torch.equal(logits(model), logits(reference))


def test_a_base_model_s_names_are_found_and_kept(tmp_path: Path) -> None:
    reference = save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    model, names = filled(tmp_path)
    assert torch.equal(logits(model), logits(reference))
    assert names.source_module("model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"


def test_experts_are_found_under_the_names_of_the_file(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    model, names = filled(tmp_path)
    name = next(n for n, _ in model.named_parameters() if n.endswith("layers.1.mlp.experts.gate_up_proj"))
    experts, rows, _ = model.get_parameter(name).shape
    scales = torch.arange(experts * rows).reshape(experts, rows, 1)
    back = names.to_sources({name: scales})
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert torch.equal(back[f"{prefix}.2.w1.weight"], scales[2, : rows // 2])
    assert torch.equal(back[f"{prefix}.3.w3.weight"], scales[3, rows // 2 :])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        WeightMap(build_meta_model(tmp_path), Checkpoint.open(tmp_path))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_wrong_shape_is_named_with_both_shapes(architecture: str, tmp_path: Path) -> None:
    save(architecture, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    with pytest.raises(CheckpointError, match=r"(48.*56|96.*112)"):
        WeightMap(build_meta_model(tmp_path), Checkpoint.open(tmp_path))


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be made from"):
        WeightMap(build_meta_model(tmp_path), Checkpoint.open(tmp_path))


def test_the_text_model_of_a_multimodal_checkpoint_keeps_the_file_s_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {
        k: v
        for k, v in ARCHITECTURES["llama"].items()
        if not k.endswith("_id") and k != "max_position_embeddings"
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config={**text, "layer_types": ["full_attention"] * 2}, vision_config=vision)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, names = filled(tmp_path)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert names.unused
    assert all(name.startswith("model.visual.") for name in names.unused)
    name = next(name for name, _ in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
    assert name == "model.layers.1.mlp.up_proj"
    assert names.source_module(name) == "model.language_model.layers.1.mlp.up_proj"
