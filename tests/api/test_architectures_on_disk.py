"""What the job writes for an architecture loads back bit for bit through each layout, and where people serve.

One of each kind: writing and loading all classes takes too long here.
"""

from pathlib import Path

import pytest
import torch
from benchmarks.small_models import small_model
from benchmarks.sweep import CLASSES, TOKENS
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlinear import load, quantize
from qlinear.checkpoint.layouts import MigrationPolicy
from qlinear.nn import QLinear

pytestmark = pytest.mark.slow

DENSE = ["Llama", "Qwen3", "Gemma3Text", "Phi3", "Cohere", "Olmo2", "OPT", "GPTNeoX", "StableLm", "Mamba2"]
MIXTURES = ["Qwen3Moe", "DeepseekV3"]
# Attention with an indexer, whose code casts to the dtype of a linear's weight; and one that rescales some.
CONSULTING = ["DeepseekV32", "GlmMoeDsa", "HYV4", "AXK2", "Dots3NoteText", "Rwkv"]


def written(name: str, folder: Path, layout: str, keep: MigrationPolicy = "never") -> Path:
    """The class, smoothed and quantized, with the vectors that `keep` says, in that layout; where to."""
    model, out = folder / "model", folder / f"{layout}-{keep}"
    if not model.exists():
        small_model(CLASSES[name]).save_pretrained(model)
    quantize(model, out, "w8a8", format=layout, migration_scale=keep, calibration=TOKENS)
    return out


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS, use_cache=False).logits
    return result


@pytest.mark.filterwarnings("default")  # what other people's models warn of is theirs
@pytest.mark.parametrize("name", DENSE + MIXTURES)
def test_every_layout_gives_back_the_same_codes(name: str, tmp_path: Path) -> None:
    loaded = {
        layout: load(written(name, tmp_path, layout))
        for layout in ("qlinear", "compressed-tensors", "lmdeploy")
    }
    first, *others = (
        {n: m for n, m in model.named_modules() if isinstance(m, QLinear)} for model in loaded.values()
    )
    assert first
    for layers in others:
        assert layers.keys() == first.keys()
        for key, layer in layers.items():
            assert torch.equal(layer.weight, first[key].weight)
            assert torch.equal(layer.weight_scale, first[key].weight_scale)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", DENSE + MIXTURES)
@pytest.mark.parametrize("keep", ["unfolded", "always"])
def test_kept_vectors_come_back_from_every_layout_that_holds_them(
    name: str, keep: MigrationPolicy, tmp_path: Path
) -> None:
    one, other = (
        load(written(name, tmp_path, layout, keep), dtype="float32") for layout in ("qlinear", "lmdeploy")
    )
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert torch.equal(logits(one), logits(other))
    if keep == "always":
        layers = {n: m for n, m in one.named_modules() if isinstance(m, QLinear)}
        assert any(layer.migration_scale is not None for layer in layers.values())
        source = small_model(CLASSES[name]).state_dict()
        untouched = [key for key, tensor in states[0].items() if key in source and tensor.dim() == 1]
        norms = [key for key in untouched if key.rpartition(".")[0] not in layers]
        assert norms
        assert all(torch.equal(states[0][key], source[key]) for key in norms), "no producer takes anything"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", DENSE)
def test_plain_transformers_loads_what_dense_models_become(name: str, tmp_path: Path) -> None:
    out = written(name, tmp_path, "compressed-tensors")
    exact = logits(small_model(CLASSES[name]))
    ours = logits(load(out, dtype="float32")) - exact
    theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)) - exact
    assert float(theirs.norm()) < 1.25 * float(ours.norm()), (
        "the codes are the same, only activations round otherwise"
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CONSULTING)
@pytest.mark.parametrize("smooth", [0.5, "off"])
def test_models_that_need_a_weight_as_floats_run_when_loaded(
    name: str, smooth: float | str, tmp_path: Path
) -> None:
    model = small_model(CLASSES[name])
    model.save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", tmp_path / "out", smooth=smooth, ignore=[], calibration=TOKENS)
    assert any("dtype of their weights" in warning for warning in result.warnings)
    exact, ours = logits(model), logits(load(tmp_path / "out", dtype="float32"))
    assert float((ours - exact).norm()) < 0.5 * float(exact.norm())
