"""One block, one function: nothing that is passed in changes, and a fold that changes the output is undone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.small_models import small_model
from benchmarks.sweep import CLASSES, TOKENS

import qlinear
from qlinear.algorithms import get_algorithm
from qlinear.calibration.collect import calibrate
from qlinear.checkpoint.reader import Checkpoint
from qlinear.formats.scheme import get_scheme
from qlinear.pipeline import loop
from qlinear.pipeline.block import Block, BlockStats
from qlinear.pipeline.options import Options
from qlinear.pipeline.quantize_block import quantize_block
from qlinear.streaming.lanes import Lanes, batches_of
from qlinear.streaming.open_model import open_model
from qlinear.tracing.experiment import Trace
from qlinear.tracing.folds import Fold, find_groups
from qlinear.tracing.proof import find_and_prove_folds

from ..support.models import save_model

IDS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("w8a8", "rtn"), ("w8a8-static", "gptq"), ("w4a16-g32", "awq")]
)
def test_a_block_and_its_statistics_stay_as_they_are(
    tmp_path: Path, scheme: str, algorithm: str, dtype: torch.dtype
) -> None:
    source = save_model(
        tmp_path / "model",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = open_model(source, dtype)
    model.load()
    module = model.blocks["model.layers.0"]
    with torch.no_grad(), Lanes(model.model, [module], batches_of(IDS, 2)) as lanes:
        probe, *calibration = lanes
        trace, folds = find_and_prove_folds(module, probe.waiting, probe.waiting)
        inputs = calibrate(module, calibration, trace, needs_hessian_of=lambda weight: True, advance=False)
    block = Block("model.layers.0", module, lambda name: dtype, tuple(find_groups(trace, folds)))
    stats = BlockStats(inputs, is_measured=True)
    names = [block.full_name(weight) for weight in block.weights()]
    options = Options(
        get_scheme(scheme),
        get_algorithm(algorithm),
        smooth="auto",
        schemes=dict.fromkeys(names, get_scheme(scheme)),
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    sums = {weight: float(s.absmax.sum() + s.sample.float().sum()) for weight, s in inputs.items()}
    first, second = (quantize_block(block, stats, options) for _ in range(2))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert sums == {weight: float(s.absmax.sum() + s.sample.float().sum()) for weight, s in inputs.items()}
    assert len(first.quantized) == len(names)
    for a, b in zip(first.quantized, second.quantized, strict=True):
        assert torch.equal(a.linear.weight.codes.float(), b.linear.weight.codes.float())
    assert first.smoothing.vectors, "a norm took a vector, which the block does not have yet"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["compressed-tensors", "qlinear"])
def test_a_fold_that_changes_the_output_is_undone_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, format: str
) -> None:
    """As if the proof had been wrong: readers of a norm get the vector of other channels. The source is in float32."""
    source = save_model(
        tmp_path / "model",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )

    def mistaken(*args: Any) -> tuple[Trace, list[Fold]]:
        trace, folds = find_and_prove_folds(*args)
        return trace, [_permuted(fold) if fold.producer.name == "input_layernorm" else fold for fold in folds]

    right = qlinear.quantize(source, tmp_path / "right", calibration=IDS, dtype=dtype, format=format)
    assert not right.warnings
    monkeypatch.setattr(loop, "find_and_prove_folds", mistaken)
    result = qlinear.quantize(source, tmp_path / "wrong", calibration=IDS, dtype=dtype, format=format)
    assert any("model.layers.0.input_layernorm: folding" in note for note in result.warnings)
    homes = {layer.name: layer.migration for layer in result.layers}
    assert homes["model.layers.0.self_attn.q_proj"] == ("kept" if format == "qlinear" else "none")
    assert homes["model.layers.0.mlp.up_proj"] == "folded"
    costs = [
        qlinear.evaluate(tmp_path / name, source, data=IDS, tokens=96, seq_len=24).kl
        for name in ("right", "wrong")
    ]
    assert costs[0] is not None
    assert costs[1] is not None
    # Without outliers smoothing is worth little: the model is as good without that fold, and in pieces with it.
    assert costs[1] < 3 * costs[0] + 1e-4


def _permuted(fold: Fold) -> Fold:
    readers = tuple(replace(reader, channels=reader.channels.roll(1)) for reader in fold.readers)
    return replace(fold, readers=readers)


def test_a_router_that_is_held_in_float32_is_smoothed_once(tmp_path: Path) -> None:
    """HunYuan's mixture holds its router in float32 beside bfloat16; the check of the folds must not change it."""
    model = small_model(CLASSES["HunYuanMoEV1"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        qlinear.quantize(
            tmp_path / "model", tmp_path / dtype, calibration=TOKENS, dtype=dtype, format="qlinear"
        )
    name = next(n for n in Checkpoint.open(tmp_path / "model").tensors if n.endswith("gate.wg.weight"))
    gain = name.replace("mlp.gate.wg", "post_attention_layernorm")
    source, *results = (Checkpoint.open(tmp_path / folder) for folder in ("model", "float32", "bfloat16"))
    for result in results:
        # What the gain lost, the router's columns gained: their product is the source's, to the rounding of both.
        product, expected = (c.read(name).float() * c.read(gain).float() for c in (result, source))
        torch.testing.assert_close(product, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
