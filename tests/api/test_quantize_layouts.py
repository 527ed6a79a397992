"""Every layout and every policy for smoothing vectors: what is written is what is read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmarks.small_models import small_model
from safetensors.torch import load_file
from torch import Tensor

import qlinear
from qlinear.algorithms import get_algorithm
from qlinear.api.calibrate import write_statistics
from qlinear.errors import CheckpointError, DataError, SchemeError
from qlinear.formats.scheme import SCHEMES
from qlinear.nn import QLinear, SmoothedLinear
from qlinear.pipeline.block import Block, BlockStats
from qlinear.pipeline.options import Options
from qlinear.pipeline.quantize_block import quantize_block
from qlinear.pipeline.run import Result

pytestmark = pytest.mark.slow

TOKENS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


def source(folder: Path, architecture: str) -> tuple[Path, Tensor]:
    """A tiny random checkpoint, and its logits."""
    model = small_model(getattr(transformers, f"{architecture}Config"))
    model.save_pretrained(folder / "source")
    with torch.no_grad():
        return folder / "source", model(TOKENS, use_cache=False).logits


def quantized(folder: Path, model: Path, **options: Any) -> tuple[Result, torch.nn.Module]:
    result = qlinear.quantize(model, folder / "out", calibration=TOKENS, overwrite=True, **options)
    return result, qlinear.load(folder / "out", dtype="float32")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS, use_cache=False).logits
    return result


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "Olmo", "GPT2", "Mixtral"])
def test_smoothing_alone_leaves_the_function_as_it_was(architecture: str, tmp_path: Path) -> None:
    model, expected = source(tmp_path, architecture)
    result, loaded = quantized(tmp_path, model, scheme="none")
    assert result.layers == ()
    assert relative(logits(loaded), expected) < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before), "something was folded"


@pytest.mark.parametrize(
    ("architecture", "keep"),
    [("Llama", "always"), ("Olmo", "unfolded"), ("GPTNeoX", "unfolded"), ("Qwen2Moe", "always")],
)
def test_float_layers_keep_their_vectors_and_the_function(
    architecture: str, keep: Any, tmp_path: Path
) -> None:
    model, expected = source(tmp_path, architecture)
    result, loaded = quantized(tmp_path, model, scheme="none", format="qlinear", migration_scale=keep)
    assert relative(logits(loaded), expected) < 1e-5
    held = {name: m for name, m in loaded.named_modules() if isinstance(m, SmoothedLinear)}
    assert held
    assert held.keys() == {layer.name for layer in result.layers if layer.migration == "kept"}
    others = {layer.migration for layer in result.layers if layer.name not in held}
    assert others == (set() if keep == "always" else {"folded"})
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    vectors = {f"{name}.migration_scale": layer.migration_scale for name, layer in held.items()}
    assert {key for key in after if key not in before} == vectors.keys()
    assert all(torch.equal(vector, after[key]) for key, vector in vectors.items())
    assert all(torch.equal(layer.weight, after[f"{name}.weight"]) for name, layer in held.items())
    if keep == "always":
        smoothed = {
            f"{name}.weight": before[f"{name}.weight"] * m.migration_scale for name, m in held.items()
        }
        assert all(torch.equal(after[key], smoothed.get(key, before[key])) for key in before)
    told = qlinear.inspect(tmp_path / "out")
    where = {layer.name: layer.migration for layer in result.layers}
    assert all(linear.migration == where.get(linear.name, "none") for linear in told.linears)
    assert {linear.scheme for linear in told.linears} == {None}
    grown = sum(linear.bytes_after - linear.bytes_before for linear in told.linears)
    assert (
        grown == sum(vector.nbytes for vector in vectors.values()) == told.total_size - told.total_size_before
    )


def test_a_float_checkpoint_with_vectors_is_evaluated_a_block_at_a_time(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Llama")
    quantized(tmp_path, model, scheme="none", format="qlinear", migration_scale="always")
    found = qlinear.evaluate(tmp_path / "out", reference=model, data="random", tokens=64, seq_len=16)
    assert found.kl is not None
    assert found.kl < 1e-8
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)


def test_a_vector_that_is_missing_or_belongs_to_no_layer_is_named(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Llama")
    quantized(tmp_path, model, scheme="none", format="qlinear", migration_scale="always")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["migration_scale"] += ["model.norm"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.norm holds a migration scale"):
        qlinear.load(tmp_path / "out")
    config["quantization_config"]["migration_scale"] = ["lm_head"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.migration_scale"):
        qlinear.load(tmp_path / "out")


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral"])
def test_each_layout_gives_the_same_model(architecture: str, tmp_path: Path) -> None:
    model, expected = source(tmp_path, architecture)
    found = []
    for layout in ("compressed-tensors", "lmdeploy", "qlinear"):
        result, loaded = quantized(tmp_path, model, format=layout)
        assert all(layer.migration == "folded" for layer in result.layers)
        found.append(logits(loaded))
    assert relative(found[0], expected) < 0.06
    assert all(torch.equal(other, found[0]) for other in found[1:]), "no layout touches a code"


@pytest.mark.parametrize("layout", ["lmdeploy", "qlinear"])
def test_kept_vectors_leave_norms_alone_and_serve_as_well(layout: str, tmp_path: Path) -> None:
    model, expected = source(tmp_path, "Qwen2")
    result, loaded = quantized(tmp_path, model, format=layout, migration_scale="always")
    assert {layer.migration for layer in result.layers} == {"kept"}
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert all(
        torch.equal(before[key], after[key]) for key in before if "norm" in key or key.endswith("bias")
    )
    layers = [m for m in loaded.modules() if isinstance(m, QLinear)]
    assert len(layers) == len(result.layers)
    assert all(layer.migration_scale is not None for layer in layers)
    assert relative(logits(loaded), expected) < 0.05


def test_what_nothing_can_take_is_kept_where_there_is_a_place_and_named_where_there_is_none(
    tmp_path: Path,
) -> None:
    model, _ = source(tmp_path, "Olmo")  # its norms have no gain
    kept, _ = quantized(tmp_path, model, format="qlinear")
    assert {layer.migration for layer in kept.layers} == {"kept", "folded"}
    assert kept.warnings == ()
    bare, _ = quantized(tmp_path, model)
    assert {layer.migration for layer in bare.layers} == {"none", "folded"}
    named = " ".join(bare.warnings)
    assert all((layer.name in named) == (layer.migration == "none") for layer in bare.layers)


def test_linears_that_store_in_out_are_quantized_where_the_layout_can_say_so(tmp_path: Path) -> None:
    model, expected = source(tmp_path, "GPT2")
    _, loaded = quantized(tmp_path, model, format="qlinear")
    assert relative(logits(loaded), expected) < 0.05
    assert sum(isinstance(m, QLinear) for m in loaded.modules()) == 8
    with pytest.raises(SchemeError, match="--format qlinear"):
        quantized(tmp_path, model, format="compressed-tensors")


def test_experts_are_quantized_one_by_one_and_routers_are_not(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Qwen2Moe")
    quantized(tmp_path, model)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expert = "model.layers.0.mlp.experts.1.down_proj"
    assert tensors[f"{expert}.weight"].dtype == torch.int8
    assert tensors[f"{expert}.weight_scale"].shape == (tensors[f"{expert}.weight"].shape[0], 1)
    assert tensors["model.layers.0.mlp.gate.weight"].is_floating_point()
    assert tensors["model.layers.0.mlp.shared_expert_gate.weight"].is_floating_point()


def test_static_scales_are_equal_where_engines_merge(tmp_path: Path) -> None:
    model, expected = source(tmp_path, "Llama")
    _, loaded = quantized(tmp_path, model, scheme="w8a8-static")
    assert relative(logits(loaded), expected) < 0.1
    layer = loaded.get_submodule("model.layers.1")
    q, k, v = (layer.get_submodule(f"self_attn.{name}_proj").input_scale for name in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)


@pytest.mark.parametrize("architecture", ["Llama", "OPT"])
def test_turned_channels_are_folded_and_read_back(architecture: str, tmp_path: Path) -> None:
    model, expected = source(tmp_path, architecture)
    options: dict[str, Any] = {"smooth": 0.9, "ignore": []}
    lost = {}
    for scheme in ("w8a8-static", "w8a8-static-asym"):
        result, loaded = quantized(tmp_path, model, scheme=scheme, **options)
        lost[scheme] = sum(layer.error**2 for layer in result.layers)
        assert relative(logits(loaded), expected) < 0.1
    assert lost["w8a8-static-asym"] < lost["w8a8-static"]
    norms = [
        t for name, t in load_file(tmp_path / "out" / "model.safetensors").items() if "norm.weight" in name
    ]
    assert any(bool((t < 0).any()) for t in norms), "some channel was turned"


def test_a_static_scale_is_found_for_the_head_too(tmp_path: Path) -> None:
    model, expected = source(tmp_path, "Llama")
    result, loaded = quantized(
        tmp_path, model, scheme="w8a8-static", ignore=[], algorithm="gptq", smooth="auto"
    )
    assert result.layers[-1].name == "lm_head"
    assert loaded.get_submodule("lm_head").input_scale is not None
    assert relative(logits(loaded), expected) < 0.1


def test_a_static_head_is_refused_where_statistics_do_not_know_it(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Llama")
    write_statistics(model, tmp_path / "s.pth", calibration=TOKENS)
    options: dict[str, Any] = {"stats": tmp_path / "s.pth", "ignore": []}
    with pytest.raises(DataError, match="--ignore lm_head"):
        qlinear.quantize(model, tmp_path / "out", "w8a8-static", **options)
    assert not (tmp_path / "out").exists()
    assert qlinear.quantize(model, tmp_path / "out", "w8a8", **options).layers[-1].name == "lm_head"


def test_a_static_linear_that_no_token_reached_is_refused() -> None:
    linear = torch.nn.Linear(8, 4)
    block = Block("experts.3", linear, lambda name: torch.float32)
    static = SCHEMES["w8a8-static"]
    options = Options(static, get_algorithm("rtn"), smooth=None, schemes={"experts.3": static})
    with pytest.raises(DataError, match=r"experts\.3, which no calibration token reached"):
        quantize_block(block, BlockStats(), options)


def test_a_policy_that_the_layout_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Llama")
    with pytest.raises(SchemeError, match="needs a format that holds it"):
        quantized(tmp_path, model, migration_scale="always")
    with pytest.raises(SchemeError, match="unfolded, always or never"):
        quantized(tmp_path, model, format="qlinear", migration_scale="sometimes")
    with pytest.raises(SchemeError, match="format must be one of"):
        quantized(tmp_path, model, format="gguf")


@pytest.mark.parametrize(
    "through", [("lmdeploy",), ("qlinear",), ("qlinear", "lmdeploy", "compressed-tensors")]
)
def test_converting_there_and_back_gives_the_same_bytes(through: tuple[str, ...], tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Qwen2")
    _, loaded = quantized(tmp_path, model)
    folder = tmp_path / "out"
    for layout in through:
        folder = qlinear.convert(folder, tmp_path / f"as-{layout}", layout)
        assert torch.equal(logits(qlinear.load(folder, dtype="float32")), logits(loaded))
    back = load_file(qlinear.convert(folder, tmp_path / "back", "compressed-tensors") / "model.safetensors")
    first = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == first.keys()
    assert all(torch.equal(back[key], first[key]) for key in first)


def test_a_kept_vector_is_not_lost_in_conversion(tmp_path: Path) -> None:
    model, _ = source(tmp_path, "Llama")
    quantized(tmp_path, model, format="qlinear", migration_scale="always")
    with pytest.raises(SchemeError, match="migration scale"):
        qlinear.convert(tmp_path / "out", tmp_path / "other", "compressed-tensors")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="not quantized"):
        qlinear.convert(model, tmp_path / "other", "lmdeploy")
