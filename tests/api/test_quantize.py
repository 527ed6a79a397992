"""The main job on tiny random models of many shapes: what it writes, that it loads, and that it keeps the function."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlinear
from qlinear import QLinearError
from qlinear.checkpoint.reader import Checkpoint
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import get_scheme
from qlinear.nn import QLinear
from qlinear.streaming import spill as memory
from qlinear.streaming.lanes import Lane

from ..support.models import VOCABULARY, contents, save_model, save_tokenizer

IDS = torch.arange(3, 45).reshape(3, 14)
QUICK: dict[str, Any] = {"calibration": IDS}

# One of every kind of source: tied and untied, biases, norms that add 1, fused projections, other forms of file.
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "llama-one-layer": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 6,
        "attention_bias": True,
    },
    "qwen2": {"dtype": torch.float16, "shard": "10KB"},
    "qwen3": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "num_attention_heads": 2, "dtype": torch.bfloat16},
    "phi3": {},
    "opt": {"ffn_dim": 45, "word_embed_proj_dim": 30},
    "falcon": {"num_kv_heads": 1, "new_decoder_architecture": True, "shard": "10KB"},
    "gpt_neox": {"num_attention_heads": 3},
}


def save_source(name: str, folder: Path) -> Path:
    return save_model(folder, name.split("-")[0], **SOURCES[name])


# Each source with the dtypes to compute in; what the processor would choose does not matter.
COMPUTED = [
    (name, dtype)
    for name, options in SOURCES.items()
    for dtype in (["float32", "bfloat16"] if options.get("dtype") == torch.bfloat16 else ["float32"])
]


@pytest.fixture(scope="module", params=COMPUTED, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and the job's output."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
    source = save_source(name, folder / "source")
    qlinear.quantize(source, folder / "out", dtype=dtype, **QUICK)
    return source, folder / "out"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("llama"))
    save_tokenizer(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found.float()


def original(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def layers_of(model: nn.Module) -> Iterator[tuple[str, QLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            yield name, module


def as_compressed_tensors_computes(model: nn.Module) -> nn.Module:
    """The model with our codes and that package's arithmetic: tokens over 127.5, and a product of floats."""
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)

    def forward(layer: QLinear, x: Tensor) -> Tensor:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, layer)
        weight = layer.weight.float() * layer.weight_scale
        return nn.functional.linear(fake_quantize(x, scale, zero_point, args), weight, layer.bias)

    for _, layer in layers_of(model):
        layer.forward = forward.__get__(layer)
    return model


def test_plain_transformers_loads_it_and_agrees(made: tuple[Path, Path]) -> None:
    _, out = made
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = as_compressed_tensors_computes(qlinear.load(out, dtype="float32"))
    assert distance(logits(theirs), logits(ours)) < 1e-5


def test_its_function_is_near_the_original(made: tuple[Path, Path]) -> None:
    source, out = made
    assert distance(logits(qlinear.load(out, dtype="float32")), logits(original(source))) < 0.05


def test_loading_gives_the_codes_of_the_file(made: tuple[Path, Path]) -> None:
    _, out = made
    stored, layers = tensors_of(out), dict(layers_of(qlinear.load(out)))
    assert len(layers) == sum(name.endswith("weight_scale") for name in stored)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, stored[f"{name}.weight"])
        assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"])
        assert layer.weight_scale.dtype == torch.float32


def test_the_config_is_valid_and_names_every_float_linear(made: tuple[Path, Path]) -> None:
    source, out = made
    config = json.loads((out / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    linears = {name for name, m in original(source).named_modules() if isinstance(m, nn.Linear)}
    quantized = dict(layers_of(qlinear.load(out)))
    assert linears - set(quantized) <= set(read.ignore)
    assert not set(quantized) & set(read.ignore)
    before = json.loads((source / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == before


def test_what_is_not_quantized_keeps_its_dtype_and_shape(made: tuple[Path, Path]) -> None:
    source, out = made
    before, after = tensors_of(source), tensors_of(out)
    assert set(before) <= set(after)
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape
        assert after[name].dtype == (torch.int8 if f"{name}_scale" in after else tensor.dtype)
    assert all(name.removesuffix("_scale") in before for name in set(after) - set(before))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [case for case in COMPUTED if case[0] in ("llama", "llama-tied", "qwen2", "gemma3_text", "phi3", "opt")],
)
def test_folding_leaves_the_float_function_unchanged(name: str, dtype: str, tmp_path: Path) -> None:
    source = save_source(name, tmp_path / "source")
    qlinear.quantize(source, tmp_path / "out", scheme="none", dtype=dtype, **QUICK)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert any(not torch.equal(before[key], after[key]) for key in before if "norm" in key)
    # Weights are stored rounded to the file's dtype once more: that is all that may differ.
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    limit = rounding[SOURCES[name].get("dtype", torch.float32)]
    assert distance(logits(original(tmp_path / "out")), logits(original(source))) < limit


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "phi3"])
def test_without_smoothing_weights_are_rounded_and_all_else_is_copied(name: str, tmp_path: Path) -> None:
    source = save_source(name, tmp_path / "source")
    qlinear.quantize(source, tmp_path / "out", smooth="off")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for key, tensor in before.items():
        if f"{key}_scale" in after:
            rounded = quantize_tensor(tensor, get_scheme("w8a8").weight)
            assert torch.equal(after[key], rounded.codes)
            assert torch.equal(after[f"{key}_scale"], rounded.scale)
        else:
            assert torch.equal(after[key], tensor)


def test_a_torch_checkpoint_gives_what_its_safetensors_twin_gives(source: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    torch.save(load_file(source / "model.safetensors"), twin / "pytorch_model.bin")
    (twin / "config.json").write_bytes((source / "config.json").read_bytes())
    qlinear.quantize(twin, tmp_path / "a", **QUICK)
    qlinear.quantize(source, tmp_path / "b", **QUICK)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "a" / "pytorch_model.bin").exists()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(source: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        qlinear.quantize(source, tmp_path / name, calibration="random", samples=2, seq_len=7, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_the_smallest_calibration_set_is_enough(source: Path, tmp_path: Path) -> None:
    result = qlinear.quantize(source, tmp_path / "out", calibration="random", samples=1, seq_len=2)
    assert all(layer.migration == "folded" for layer in result.layers)


def test_texts_and_iterables_of_texts_calibrate_alike(source: Path, tmp_path: Path) -> None:
    text = " ".join(f"w{3 + i % 90}" for i in range(64))
    (tmp_path / "text.txt").write_text(text)
    sizes = {"samples": 4, "seq_len": 16}
    qlinear.quantize(source, tmp_path / "a", calibration=tmp_path / "text.txt", **sizes)
    qlinear.quantize(source, tmp_path / "b", calibration=[text], **sizes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_small_shards_have_a_right_index(source: Path, tmp_path: Path) -> None:
    result = qlinear.quantize(source, tmp_path / "out", max_shard_size=8000, **QUICK)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.total_size
    shards = {file.name: load_file(file) for file in (tmp_path / "out").glob("model-*.safetensors")}
    assert len(shards) > 3
    assert {name: shard for shard, held in shards.items() for name in held} == index["weight_map"]
    assert result.total_size == sum(t.nbytes for held in shards.values() for t in held.values())
    qlinear.quantize(source, tmp_path / "one", **QUICK)
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(one[name], t) for held in shards.values() for name, t in held.items())


PATTERNS = {
    "lm_head": 14,
    "*.down_proj": 13,
    "re:.*layers[.]0[.]": 8,
    "model.layers.1.self_attn.q_proj": 12,  # engines merge k and v with it
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ignored_linears_stay_in_float_and_are_listed(source: Path, tmp_path: Path, pattern: str) -> None:
    out = tmp_path / "out"
    result = qlinear.quantize(source, out, ignore=[pattern], **QUICK)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    after = tensors_of(out)
    assert len(result.layers) == PATTERNS[pattern]
    assert len(ignored) == 15 - PATTERNS[pattern]
    assert all(after[f"{name}.weight"].dtype == torch.float32 for name in ignored)
    assert all(after[f"{layer.name}.weight"].dtype == torch.int8 for layer in result.layers)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert distance(logits(theirs), logits(original(source))) < 0.05


def test_quantizing_a_tied_head_unties_it(tmp_path: Path) -> None:
    source = save_source("llama-tied", tmp_path / "source")
    out = tmp_path / "out"
    result = qlinear.quantize(source, out, ignore=["*.q_proj"], **QUICK)
    before, after = tensors_of(source), tensors_of(out)
    assert "lm_head" in {layer.name for layer in result.layers}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    rounded = quantize_tensor(before["model.embed_tokens.weight"], get_scheme("w8a8").weight)
    assert torch.equal(after["lm_head.weight"], rounded.codes)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for model in (theirs, qlinear.load(out, dtype="float32")):
        assert distance(logits(model), logits(original(source))) < 0.05
    inspection = qlinear.inspect(out)
    assert inspection.total_size == result.total_size
    assert inspection.total_size_before == result.source_size


COPIED = ("tokenizer.json", "LICENSE", "modeling_custom.py", "chat_template.jinja", "generation_config.json")
LEFT_OUT = ("pytorch_model.bin", "model.gguf", "model.onnx", "consolidated.00.pth", ".gitattributes")


def test_other_files_come_along_and_other_weights_do_not(source: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "source")
    for name in (*COPIED, *LEFT_OUT):
        (folder / name).write_text(f"contents of {name}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The base\n")
    qlinear.quantize(folder, tmp_path / "out", smooth="off")
    written = contents(tmp_path / "out")
    assert all(written[name] == f"contents of {name}".encode() for name in COPIED)
    assert set(written) == {*COPIED, "config.json", "README.md", "qlinear.json", "model.safetensors"}


CARD = """---
license: other
license_name: base-license
license_link: https://example.org/license
language:
- en
- de
tags:
- chat
---
# The base
"""


def test_the_card_keeps_the_licence_and_every_language(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base")
    (folder / "README.md").write_text(CARD)
    qlinear.quantize(folder, tmp_path / "out", smooth="off")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.language == ["en", "de"]
    assert (data.license, data.license_name) == ("other", "base-license")
    assert data.license_link == "https://example.org/license"
    assert data.tags == ["quantized", "qlinear"]


def test_the_card_and_the_note_say_how_it_was_made(source: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "Base-1B")
    (folder / "README.md").write_text("---\nlicense: mit\nlicense_name: x: y\n---\n# The base\n")
    result = qlinear.quantize(folder, tmp_path / "out", smooth=0.7, seed=3, **QUICK)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "Base-1B"
    assert card.data.base_model_relation == "quantized"
    # The source's card is no YAML, as `x: y` is not quoted there: its other lines still count.
    assert card.data.license == "mit"
    assert "# Base-1B, w8a8" in card.text
    note = json.loads((tmp_path / "out" / "qlinear.json").read_text())
    assert (
        note["settings"].items()
        >= {"scheme": "w8a8", "smooth": 0.7, "samples": 3, "seq_len": 14, "seed": 3}.items()
    )
    assert note["versions"].keys() >= {"qlinear", "torch", "transformers"}
    assert note["source"]["fingerprint"] == Checkpoint.open(folder).fingerprint()
    assert [layer["name"] for layer in note["layers"]] == [layer.name for layer in result.layers]


def test_the_result_says_what_it_did(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = qlinear.quantize(source, tmp_path / "out", progress=lambda *step: seen.append(step), **QUICK)
    assert result.out == str(tmp_path / "out")
    assert result.total_size == Checkpoint.open(tmp_path / "out").nbytes < result.source_size
    assert len(result.layers) == 14
    for layer in result.layers:
        assert 0 < layer.error < 0.05
        assert layer.migration == "folded"
        assert layer.folded_into is not None
    for stage in ("checking weights", "quantizing"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_overwriting_replaces_a_checkpoint_whole(source: Path, tmp_path: Path) -> None:
    qlinear.quantize(source, tmp_path / "out", max_shard_size=8000, **QUICK)
    qlinear.quantize(source, tmp_path / "out", overwrite=True, **QUICK)
    qlinear.quantize(source, tmp_path / "new", **QUICK)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


BAD_IDS = {
    "outside the vocabulary": torch.full((2, 8), VOCABULARY),
    "negative": torch.full((2, 8), -1),
    "too long": torch.zeros(1, 65, dtype=torch.long),
    "not integers": torch.zeros(2, 8),
    "empty": torch.zeros(0, 8, dtype=torch.long),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_token_ids_that_do_not_fit_are_refused_and_nothing_is_written(
    source: Path, tmp_path: Path, case: str
) -> None:
    with pytest.raises(QLinearError):
        qlinear.quantize(source, tmp_path / "out", calibration=BAD_IDS[case])
    assert not (tmp_path / "out").exists()


def test_computing_in_bfloat16_gives_nearly_the_same_scales(source: Path, tmp_path: Path) -> None:
    qlinear.quantize(source, tmp_path / "a", dtype="bfloat16", **QUICK)
    qlinear.quantize(source, tmp_path / "b", dtype="float32", **QUICK)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    scales = [name for name in b if name.endswith("weight_scale")]
    assert scales
    assert all(distance(a[name], b[name]) < 0.05 for name in scales)


def test_where_hidden_states_wait_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source", max_position_embeddings=1024)
    ids = torch.arange(3 * 900).remainder(90).add(3).reshape(3, 900)
    qlinear.quantize(source, tmp_path / "in-memory", calibration=ids, seq_len=900)
    spilled: list[int] = []
    put = memory.Spill.put
    monkeypatch.setattr(memory.Spill, "is_short", True)
    monkeypatch.setattr(memory.Spill, "put", lambda *args: spilled.append(1) or put(*args))
    qlinear.quantize(source, tmp_path / "on-disk", calibration=ids, seq_len=900, max_memory=1 << 40)
    assert len(spilled) == 9  # three batches, before either block and again once the last has seen them
    assert contents(tmp_path / "on-disk") == contents(tmp_path / "in-memory")


@pytest.mark.parametrize("options", [{}, {"algorithm": "gptq"}])
def test_no_calibration_batch_passes_a_block_after_which_nothing_is_quantized(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source", max_position_embeddings=1024)
    ids = torch.arange(3 * 900).remainder(90).add(3).reshape(3, 900)
    passed: list[int] = []
    advance = Lane.advance

    def counted(lane: Lane, output: Any) -> None:
        if output[0].shape[-2] == 900:  # not one of the experiments, which are short
            passed.append(1)
        advance(lane, output)

    monkeypatch.setattr(Lane, "advance", counted)
    qlinear.quantize(source, tmp_path / "out", calibration=ids, seq_len=900, **options)
    assert len(passed) == 3  # of two blocks, the first
    qlinear.quantize(source, tmp_path / "head", calibration=ids, seq_len=900, ignore=["*.q_proj"], **options)
    assert len(passed) == 3 + 6  # both, where the head is quantized by what reaches it


def test_too_little_memory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    with pytest.raises(QLinearError, match=r"max_memory must be at least .*GB.*got 0\.0GB"):
        qlinear.quantize(source, tmp_path / "out", calibration=IDS, max_memory=1 << 20)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth": "off"},
        {"algorithm": "gptq", "max_memory": 1 << 40},
        {"scheme": "w4a16-g32", "refine": 1},
    ],
)
def test_a_plan_tells_the_size_and_writes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    source = save_model(
        tmp_path / "source", hidden_size=96, intermediate_size=64, num_hidden_layers=3, head_dim=32
    )
    ids = torch.arange(6 * 50).remainder(90).add(3).reshape(6, 50)
    asked: dict[str, Any] = {"calibration": ids, "seq_len": 50, **options}
    plan = qlinear.quantize(source, tmp_path / "out", plan=True, **asked)
    assert not (tmp_path / "out").exists()
    assert (plan.planned, plan.layers) == (True, ())
    assert plan.seconds > 0
    assert plan.peak_rss_bytes > 1 << 27
    done = qlinear.quantize(source, tmp_path / "out", **asked)
    assert not done.planned
    assert plan.total_size == pytest.approx(done.total_size, rel=0.1)
