"""transformers loads qlinear's own layout: the layers, the logits, and the files that it saves are ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import qlinear
from qlinear.formats.scheme import SCHEMES
from qlinear.nn import QLinear, SmoothedLinear

from ..support.models import save_model, save_tokenizer

IDS = torch.arange(3, 23).reshape(2, 10)
DTYPES = [torch.float32, torch.bfloat16]
WIDER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Architecture, its options, and how it is quantized: layers that keep vectors, float layers that do, every kind of
# tensor that the layout has, experts, a tied output head, fused and transposed linears.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama_with_biases": ("llama", {"attention_bias": True}, {}),
    "llama_kept": ("llama", {}, {"migration_scale": "always"}),
    "llama_smoothed_only": ("llama", {}, {"migration_scale": "always", "scheme": "none"}),
    "llama_packed": ("llama", WIDER, {"scheme": "w4a16-channel"}),
    "llama_static": ("llama", {}, {"scheme": "w8a8-static-asym"}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}, {"ignore": []}),
    "qwen3_moe": ("qwen3_moe", EXPERTS, {}),
    "gpt2": ("gpt2", {"n_embd": 30, "n_layer": 2, "n_head": 3}, {}),
    "phi3": ("phi3", {}, {}),
}


def quantized(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> Path:
    architecture, options, settings = CASES[case]
    source = save_model(folder / "source", architecture, dtype, **options)
    qlinear.quantize(source, folder / "out", format="qlinear", calibration=IDS, **settings)
    return folder / "out"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS).logits
    return output


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager", **options)


def layers(model: nn.Module) -> dict[str, str]:
    kinds = (QLinear, SmoothedLinear)
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_layers_and_logits_are_those_of_load(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = quantized(tmp_path, case, dtype)
    ours, theirs = qlinear.load(folder), loaded(folder)
    assert layers(theirs) == layers(ours) != {}
    assert theirs.dtype == dtype
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "qwen3_moe"])
def test_what_it_saves_is_what_it_loaded(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, again = quantized(tmp_path, case, dtype), tmp_path / "again"
    model = loaded(folder)
    model.save_pretrained(again)
    before, after = (load_file(path / "model.safetensors") for path in (folder, again))
    # A file need not hold the name of the outermost module, nor a tied output head.
    assert {name.removeprefix("transformer.") for name in after} == {
        name.removeprefix("transformer.") for name in before
    }
    for name, tensor in before.items():
        same = after.get(name, after.get(f"transformer.{name}"))
        assert same is not None
        assert same.dtype == tensor.dtype
        assert torch.equal(same, tensor)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, again)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(loaded(again)), logits(model))
    assert torch.equal(logits(qlinear.load(again)), logits(model))


GROUPED = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_loads_and_is_saved_as_it_was(scheme: str, tmp_path: Path) -> None:
    source, folder, again = (tmp_path / name for name in ("source", "out", "again"))
    save_model(source, dtype=torch.bfloat16, **GROUPED)
    qlinear.quantize(source, folder, scheme, format="qlinear", calibration=IDS, migration_scale="always")
    model = loaded(folder)
    assert torch.equal(logits(model), logits(qlinear.load(folder)))
    model.save_pretrained(again)
    before, after = (load_file(path / "model.safetensors") for path in (folder, again))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_int8_experts_load_and_are_not_saved_as_floats(tmp_path: Path) -> None:
    folder = quantized(tmp_path, "qwen3_moe")
    stored = load_file(folder / "model.safetensors")
    assert any(".experts." in name and t.dtype == torch.int8 for name, t in stored.items())
    with pytest.raises(ValueError, match="not serializable"):
        loaded(folder).save_pretrained(tmp_path / "again")


def test_it_generates_and_stands_in_a_pipeline(tmp_path: Path) -> None:
    folder = quantized(tmp_path, "llama_kept")
    save_tokenizer(folder)
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:]
    expected = qlinear.load(folder)
    for token in new:  # greedily, as `load`'s model would
        with torch.no_grad():
            assert token == expected(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.reshape(1, 1)], 1)
    text = pipeline("text-generation", model=str(folder))("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("w5 w6 w7")


def test_a_model_is_placed_on_the_device_that_a_map_names(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for device_map")
    folder = quantized(tmp_path, "llama")
    model = loaded(folder, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(qlinear.load(folder)))


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    from qlinear.integrations.transformers import QLinearConfig

    source = save_model(tmp_path / "source")
    with pytest.raises(ValueError, match="pre-quantized"):
        loaded(source, quantization_config=QLinearConfig())


# --- processes of their own ---

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert "qlinear" in AUTO_QUANTIZER_MAPPING and "qlinear" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert "on_import" not in str(__import__("sys").meta_path)
"""
ORDERS = {
    "ours_first": "import qlinear\nimport transformers",
    "theirs_first": "from transformers import AutoModelForCausalLM\nimport qlinear",
    "theirs_loaded_first": "from transformers.quantizers import auto\nimport qlinear",
    "ours_alone": "import qlinear",
    "twice": "import qlinear, sys\ndel sys.modules['qlinear']\nimport qlinear",
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_it_is_registered_in_whichever_order_they_are_imported(order: str) -> None:
    ran = python("-W", "error", "-c", ORDERS[order] + REGISTERED)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


PEAK = """
import sys
import qlinear, qlinear.integrations.find_layers, qlinear.integrations.load_operations
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = kilobytes("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
# Tensors are maps of the file until they are read: read every byte.
read = sum(t.detach().view(-1).float().amax().item() for t in [*model.parameters(), *model.buffers()])
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_loading_needs_hardly_more_memory_than_the_file_has_bytes(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    qlinear.quantize(tmp_path / "source", tmp_path / "out", format="qlinear", smooth="off")
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    ran = python("-c", PEAK, str(tmp_path / "out"))
    assert ran.returncode == 0, ran.stderr
    # The bound that was set for loading: 1.15 of the quantized size. `float()` above takes one tensor more, in 4 bytes
    # for each of its codes.
    assert int(ran.stdout) < 1.15 * size + 4 * 1024 * 2816
