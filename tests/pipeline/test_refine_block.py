"""Refined scales bring a block nearer to what the original gives, and are never kept where they do not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import qlinear
from qlinear import QLinearError
from qlinear.checkpoint.layouts.base import QuantizedLinear
from qlinear.checkpoint.reader import Checkpoint
from qlinear.formats.rounding import choose_qparams, quantize_tensor
from qlinear.formats.scheme import Scheme, TensorFormat, get_scheme
from qlinear.pipeline.block import Block, QuantizedWeight
from qlinear.pipeline.refine_block import Refined, hidden_state, refine
from qlinear.streaming.find_blocks import find_blocks
from qlinear.streaming.lanes import Call, Lane, Lanes, batches_of
from qlinear.streaming.spill import Spill
from qlinear.tracing.trace import Weight

from ..support.models import contents, save_model

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
IDS = torch.randint(3, 97, (12, 40), generator=torch.Generator().manual_seed(0))
PRESETS = ("w4a16-g32", "w4a16-asym", "w4a8", "w8a8", "w8a8-static", "fp8")
BLOCKS = Scheme("blocks", TensorFormat("float8_e4m3fn", "block", block_size=(8, 16)))
SCHEMES = [*map(get_scheme, PRESETS), BLOCKS]


def off_by_some(quantized: QuantizedLinear, seed: int) -> QuantizedLinear:
    """The linear with scales that are a few percent wrong, so that there is something to be found."""
    scale = quantized.weight.scale
    wrong = 1 + 0.05 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(seed))
    return replace(quantized, weight=replace(quantized.weight, scale=scale * wrong))


def rounded_linears(block: nn.Module, scheme: Scheme) -> list[QuantizedWeight]:
    made = []
    for i, (name, module) in enumerate(block.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        fmt = scheme.weight
        if fmt.group_size is not None:
            fmt = replace(fmt, group_size=32)
        held = QuantizedLinear(replace(scheme, weight=fmt), quantize_tensor(module.weight.detach(), fmt))
        if scheme.is_static and scheme.activation is not None:
            held = replace(held, input_scale=choose_qparams(torch.tensor([4.0]), scheme.activation)[0])
        made.append(QuantizedWeight(Weight(f"{name}.weight"), off_by_some(held, i), 0.0, 0.0))
    return made


@pytest.fixture
def standing() -> Iterator[tuple[nn.Module, list[Lane], list[Tensor]]]:
    """A block, lanes before it, and what it gives them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    block = next(iter(find_blocks(model).values()))
    with torch.no_grad(), Lanes(model, [block], batches_of(IDS, 2)) as lanes:
        yield block, list(lanes), [hidden_state(lane.rehearse(Call.run)).clone() for lane in lanes]


def distance(
    block: nn.Module, rounded: list[QuantizedWeight], lanes: list[Lane], targets: list[Tensor]
) -> float:
    """Another way than the code under test: copies of the block with quantized layers in place."""
    originals = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    layers = {each.weight.module: block.get_submodule(each.weight.module) for each in rounded}
    for each in rounded:
        held, linear = each.linear, layers[each.weight.module]
        layer = qlinear.nn.QLinear.from_quantized(held.weight, linear.bias, held.scheme)
        if held.input_scale is not None:
            layer.input_scale.copy_(held.input_scale)
        block.set_submodule(each.weight.module, layer)
    total = sum(
        float((hidden_state(lane.rehearse(Call.run)) - target).square().sum())
        for lane, target in zip(lanes, targets, strict=True)
    )
    for name, linear in layers.items():
        block.set_submodule(name, linear)
    assert all(torch.equal(parameter, originals[name]) for name, parameter in block.named_parameters())
    return total


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_scales_that_are_off_are_brought_back(
    standing: tuple[nn.Module, list[Lane], list[Tensor]], scheme: Scheme
) -> None:
    block, lanes, targets = standing
    start = rounded_linears(block, scheme)
    block_in_job = Block("block", block, lambda name: torch.float32)
    names = {name for name, vector in block.named_parameters() if vector.dim() == 1}
    refined = refine(block_in_job, start, lanes, targets, 4, names)
    assert refined is not None
    after = list(refined.quantized)
    # Measured: 0.20 to 0.75 of the distance at the start, by scheme.
    assert distance(block, after, lanes, targets) < 0.8 * distance(block, start, lanes, targets)
    for old, new in zip(start, after, strict=True):
        assert torch.equal(old.linear.weight.codes.float(), new.linear.weight.codes.float())
        assert new.linear.weight.scale.shape == old.linear.weight.scale.shape
        assert not new.linear.weight.scale.requires_grad
        assert (new.linear.input_scale is None) == (not scheme.is_static)


def test_what_cannot_be_bettered_stays(standing: tuple[nn.Module, list[Lane], list[Tensor]]) -> None:
    block, lanes, _ = standing
    start = rounded_linears(block, get_scheme("w8a8"))
    # Targets that the quantized block meets exactly: any step is a step away.
    values = {each.weight.name: each.linear.weight.dequantize() for each in start}
    floats = [replace(each, linear=replace(each.linear, scheme=get_scheme("w8a16"))) for each in start]
    targets = [
        lane.rehearse(
            lambda call: hidden_state(torch.func.functional_call(block, values, call.args, call.kwargs))
        )
        for lane in lanes
    ]
    block_in_job = Block("block", block, lambda name: torch.float32)
    assert refine(block_in_job, floats, lanes, targets, 1) == Refined(floats, {})


def test_gains_are_tuned_too_but_for_those_that_other_blocks_hold(
    standing: tuple[nn.Module, list[Lane], list[Tensor]],
) -> None:
    block, lanes, targets = standing
    block_in_job = Block("block", block, lambda name: torch.bfloat16)
    start = rounded_linears(block, get_scheme("w4a16-g32"))
    gains = {name: p.detach().clone() for name, p in block.named_parameters() if p.dim() == 1}
    first, *others = gains
    refined = refine(block_in_job, start, lanes, targets, 4, {first})
    assert refined is not None
    assert set(refined.vectors) == set(others)
    for name, vector in refined.vectors.items():
        assert not torch.equal(vector, gains[name])
        assert torch.equal(vector, vector.bfloat16().float())
    assert all(torch.equal(block.get_parameter(name), gain) for name, gain in gains.items())


def test_a_block_that_lets_no_gradient_back_is_left_alone(
    standing: tuple[nn.Module, list[Lane], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, lanes, targets = standing
    monkeypatch.setattr(block, "forward", torch.no_grad()(block.forward))
    block_in_job = Block("block", block, lambda name: torch.float32)
    assert refine(block_in_job, rounded_linears(block, get_scheme("w8a8")), lanes, targets, 1) is None


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"scheme": "w4a16-channel", "algorithm": "gptq"}),
    "static": ("gemma3_text", {"num_attention_heads": 2}, {"scheme": "w8a8-static"}),
    "experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
        {"scheme": "w8a16"},
    ),
    "kept vectors": ("llama", {}, {"migration_scale": "always", "format": "qlinear"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_job_writes_other_scales_and_gains_and_the_same_codes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, shape, options = MODELS[case]
    source = save_model(tmp_path / "source", kind, **shape)
    options = {"calibration": IDS, "propagate": True, "smooth": 0.5, **options}
    qlinear.quantize(source, tmp_path / "plain", **options)
    qlinear.quantize(source, tmp_path / "refined", refine=12, **options)
    monkeypatch.setattr(Spill, "is_short", True)
    monkeypatch.setattr("qlinear.streaming.lanes._MIN_SPILLED_BYTES", 0)
    qlinear.quantize(source, tmp_path / "again", refine=12, **options, max_memory=1 << 40)
    assert contents(tmp_path / "refined") == contents(tmp_path / "again")
    plain, refined = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "refined")
    assert plain.tensors.keys() == refined.tensors.keys()
    # The first block has the same inputs in both; what comes after it is calibrated with what it gives.
    first = [name for name in plain.tensors if "layers.0." in name]
    differ = {name for name in first if not torch.equal(plain.read(name), refined.read(name))}
    assert differ
    vectors = {name for name in first if plain.tensors[name].dtype.is_floating_point}
    assert differ <= {name for name in vectors if not name.endswith("migration_scale")}
    assert any("scale" in name for name in differ)
    assert any("norm" in name for name in differ)
    assert qlinear.evaluate(tmp_path / "refined", source, data=IDS, tokens=480).kl is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": -1}, "refine must be 0 or more"),
        ({"refine": 1, "scheme": "none"}, "refine must be 0 or more, and 0 where nothing is quantized"),
        ({"refine": 1, "propagate": False}, "leave out --no-propagate"),
        ({"refine": 1, "stats": "stats.safetensors"}, "leave out --stats"),
    ],
)
def test_what_cannot_be_refined_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = save_model(tmp_path / "source")
    with pytest.raises(QLinearError, match=message):
        qlinear.quantize(source, tmp_path / "out", calibration=IDS, **options)
    assert not (tmp_path / "out").exists()
