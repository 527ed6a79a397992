"""Calibration alone: what it writes is what hooks on the whole model see, for every weight, one block at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qlinear
from qlinear.algorithms.parts.static_range import SHARES
from qlinear.api.calibrate import gather_statistics, write_statistics
from qlinear.calibration.collect import calibrate
from qlinear.calibration.stats_file import STATISTICS, CalibrationStats, load_statistics
from qlinear.errors import CheckpointError, NumericsError, QLinearError
from qlinear.streaming.open_model import open_model
from qlinear.tracing.proof import run_in_float32

from ..support.models import VOCABULARY, edit_weights, save_model

IDS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
DENSE = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"dtype": torch.bfloat16},
    "phi3": {"shard": "10KB"},
    "gpt_neox": {"num_attention_heads": 3},
    "gpt2": {"n_embd": 30, "n_head": 3, "n_layer": 2},
    "falcon": {"num_kv_heads": 1, "new_decoder_architecture": True},
}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 12}


@torch.no_grad()
def inputs_by_hooks(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What every linear of the whole model reads, (tokens, in) float64, by its name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        return lambda module, args: seen.update({name: args[0].double().flatten(0, -2)})

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(hook(name))
    model(input_ids=tokens, use_cache=False)
    return seen


@pytest.mark.parametrize("architecture", DENSE)
def test_they_are_those_of_their_definitions_over_all_tokens(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", architecture, **DENSE[architecture])
    done = write_statistics(folder, tmp_path / "s.safetensors", calibration=IDS, dtype="float32")
    found, expected = load_statistics(tmp_path / "s.safetensors"), inputs_by_hooks(folder, IDS)
    assert set(found.inputs) == set(expected) - {"lm_head", "embed_out"}
    assert (done.tokens, set(done.modules), done.idle) == (IDS.numel(), set(found.inputs), ())
    for name, stats in found.inputs.items():
        x = expected[name]
        assert stats.tokens == len(x) == IDS.numel()
        wanted = {
            "absmax": x.abs().amax(0), "absmean": x.abs().mean(0), "mean": x.mean(0),
            "min": x.amin(0), "max": x.amax(0),
        }  # fmt: skip
        for statistic, value in wanted.items():
            torch.testing.assert_close(getattr(stats, statistic).double(), value, rtol=1e-3, atol=1e-4)


def test_what_reads_one_tensor_is_held_once(tmp_path: Path) -> None:
    write_statistics(save_model(tmp_path / "model"), tmp_path / "s.safetensors", calibration=IDS)
    inputs = load_statistics(tmp_path / "s.safetensors").inputs
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert inputs[f"{attention}.q_proj"] is inputs[f"{attention}.k_proj"] is inputs[f"{attention}.v_proj"]
    assert inputs[f"{mlp}.gate_proj"] is inputs[f"{mlp}.up_proj"]
    assert len({id(stats) for stats in inputs.values()}) == 2 * 4
    # Under the name of the first that reads it.
    held = {name.rpartition(".")[0] for name in load_file(tmp_path / "s.safetensors")}
    leaders = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert held == {f"model.layers.{layer}.{name}" for layer in range(2) for name in leaders}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_block_gets_from_the_file_what_calibration_would_give_it(
    architecture: str, suffix: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", architecture, **(EXPERTS if architecture == "mixtral" else {}))
    write_statistics(folder, tmp_path / f"s{suffix}", calibration=IDS)
    source, statistics = open_model(folder), load_statistics(tmp_path / f"s{suffix}")
    batch = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad(), source.lanes([batch]) as lanes:
        while (block := lanes.at) is not source.head:
            assert block is not None
            with source.loaded(block):
                name, trace = source.name_of(block), run_in_float32(block, lanes[0].waiting)
                expected, given = calibrate(block, list(lanes), trace, name), statistics.of_block(name, trace)
            assert set(given) == set(expected)
            shared = {(a, b) for a in expected for b in expected if expected[a] is expected[b]}
            assert shared == {(a, b) for a in given for b in given if given[a] is given[b]}
            for weight, stats in expected.items():
                assert given[weight].sample.shape == (0, len(stats.absmax))
                for statistic in STATISTICS:
                    torch.testing.assert_close(getattr(given[weight], statistic), getattr(stats, statistic))


def test_experts_that_saw_no_token_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "mixtral", **EXPERTS)
    done = write_statistics(folder, tmp_path / "s.safetensors", calibration=IDS[:1, :4])
    found = load_statistics(tmp_path / "s.safetensors")
    assert done.idle == tuple(sorted(found.idle))
    experts = {n for n in (*found.inputs, *found.idle) if ".experts." in n}
    assert len(experts) == 2 * 2 * 8, "two matrices of each of eight experts in each of two blocks"
    # Four tokens reach at most four of eight experts.
    assert len(found.idle) >= 2 * 2 * 4
    assert all(".experts." in name for name in found.idle)
    assert not found.idle & set(found.inputs)
    for layer in range(2):
        read = [n for n in found.inputs if f"layers.{layer}." in n and ".experts.gate_up_proj." in n]
        assert sum(found.inputs[name].tokens for name in read) == 4, "every token went to one expert"


class Repeated(nn.ModuleList):
    """Blocks of which a slice gives each twice: the model passes them again, as those that share a block do."""

    def __getitem__(self, index: int | slice) -> nn.Module:
        found = super().__getitem__(index)
        return [*found, *found] if isinstance(index, slice) else found


def test_a_block_that_is_passed_twice_counts_both_times(tmp_path: Path) -> None:
    source = open_model(save_model(tmp_path / "model", num_hidden_layers=1))
    once, layers = gather_statistics(source, IDS), source.model.model.layers
    layers.__class__ = Repeated
    twice = gather_statistics(source, IDS)
    for name, stats in twice.inputs.items():
        assert stats.tokens == 2 * IDS.numel()
        assert bool((stats.absmax >= once.inputs[name].absmax).all())


def test_a_file_of_statistics_knows_its_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    write_statistics(folder, tmp_path / "s.safetensors", calibration=IDS)
    fingerprint = open_model(folder).checkpoint.fingerprint()
    assert load_statistics(tmp_path / "s.safetensors", fingerprint).fingerprint == fingerprint


def test_what_cannot_be_done_writes_nothing(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    qlinear.quantize(folder, tmp_path / "made", calibration=IDS)
    with pytest.raises(CheckpointError, match="quantized"):
        write_statistics(tmp_path / "made", tmp_path / "s.pth", calibration=IDS)
    with pytest.raises(QLinearError, match="safetensors"):
        write_statistics(folder, tmp_path / "s.json", calibration=IDS)
    large = save_model(tmp_path / "large", dtype=torch.float16)
    edit_weights(large, lambda t: t["model.embed_tokens.weight"].fill_(torch.inf))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        write_statistics(large, tmp_path / "s.pth", calibration=IDS)
    assert not list(tmp_path.glob("*s.*"))
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_left_in_memory_of_a_block_that_was_passed(tmp_path: Path) -> None:
    source = open_model(save_model(tmp_path / "model"))
    found: CalibrationStats = gather_statistics(source, IDS)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert all(stats.sample.untyped_storage().nbytes() == 0 for stats in found.inputs.values())


@pytest.mark.parametrize(
    ("architecture", "scheme", "suffix"),
    [
        ("llama", "w8a8", ".safetensors"),
        ("llama", "w8a8", ".pth"),
        ("gemma3_text", "w8a8-static", ".pth"),
        ("mixtral", "w8a8", ".safetensors"),
    ],
)
def test_a_job_makes_the_same_codes_of_a_file_as_of_the_text(
    architecture: str, scheme: str, suffix: str, tmp_path: Path
) -> None:
    many = EXPERTS | {"num_local_experts": 16}
    folder = save_model(tmp_path / "model", architecture, **(many if architecture == "mixtral" else {}))
    ids = IDS[:1] if architecture == "mixtral" else IDS  # sixteen tokens do not reach sixteen experts
    done = write_statistics(folder, tmp_path / f"s{suffix}", calibration=ids)
    assert bool(done.idle) == (architecture == "mixtral")
    qlinear.quantize(folder, tmp_path / "a", scheme, calibration=ids)
    told = qlinear.quantize(folder, tmp_path / "b", scheme, stats=tmp_path / f"s{suffix}")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name, tensor in expected.items():
        if name.endswith("input_scale"):  # a file holds no sample, on which the share of the range was chosen
            assert any(torch.allclose(tensor, found[name] * share) for share in SHARES)
        else:
            assert torch.equal(found[name], tensor)
    assert len(told.layers) > 0
    assert all(0 < layer.error < 0.1 for layer in told.layers), "without a sample, of the weight"
