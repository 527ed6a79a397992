"""What rounding makes of the inputs of a block, as a job sees it: by the definition, of the smoothed block."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qlinear
from qlinear import Scheme, TensorFormat
from qlinear.algorithms.base import RoundedInput
from qlinear.formats.rounding import choose_qparams, dequantize, qparams_from_range, quantize
from qlinear.pipeline import loop
from qlinear.pipeline.block import Block, BlockStats, MeasuredInput, RoundedInputs
from qlinear.pipeline.options import Options
from qlinear.pipeline.rounded_inputs import measure_rounded_inputs
from qlinear.pipeline.smoothing import SmoothedBlock
from qlinear.runtime.distributed import Ranks
from qlinear.streaming.lanes import Lane

from ..api.test_quantize_algorithms import IDS, with_outliers
from ..support.models import edit_weights, save_model

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "num_attention_heads": 2}
W4A8 = Scheme(
    "w4a8-g16",
    TensorFormat("int4", "group", group_size=16),
    TensorFormat("int8", "token", dynamic=True),
)


class Watched:
    """Stands in for the measuring pass, and compares it with inputs that hooks take from the smoothed block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, tuple[RoundedInput, RoundedInput]] = {}
        self.calls = 0
        monkeypatch.setattr(loop, "measure_rounded_inputs", self)

    def __call__(
        self,
        block: Block,
        stats: BlockStats,
        smoothed: SmoothedBlock,
        lanes: Sequence[Lane],
        options: Options,
        ranks: Ranks,
    ) -> RoundedInputs:
        before = {name: value.clone() for name, value in block.module.state_dict().items()}
        measured = measure_rounded_inputs(block, stats, smoothed, lanes, options, ranks)
        assert all(torch.equal(before[name], value) for name, value in block.module.state_dict().items())
        self.calls += 1
        for weight, rounded in measured.items():
            name = block.full_name(weight)
            self.seen[name] = rounded.halves
            vector = smoothed.smoothing.migration.get(weight, torch.ones(()))
            tokens = [x.float() / vector for x in inputs_of(block, smoothed, weight.module, lanes)]
            halves = [half for x in tokens for half in (x[: len(x) // 2], x[len(x) // 2 :])]
            for mine, some in zip(rounded.halves, (halves[::2], halves[1::2]), strict=True):
                self.compare(mine, torch.cat(some), rounded, options.schemes[name].activation)
        return measured

    @staticmethod
    def compare(half: RoundedInput, x: Tensor, measured: MeasuredInput, fmt: Any) -> None:
        qparams = choose_qparams(x, fmt)
        if not fmt.dynamic:
            qparams = qparams_from_range(measured.low.min().view(1), measured.high.max().view(1), fmt)
        rounded = dequantize(quantize(x, *qparams, fmt), *qparams, fmt).double()
        lost = x.double() - rounded
        size = rounded.square().mean(0).sqrt()
        for mine, expected in (
            (half.hessian, rounded.T @ rounded / len(x)), (half.drift, lost.T @ rounded / len(x)),
        ):  # fmt: skip
            scale = (size * size.unsqueeze(1)).clamp(min=1e-12)
            assert float(((mine.double() - expected) / scale).abs().max()) < 1e-4
        assert half.tokens == len(x)


def inputs_of(block: Block, smoothed: SmoothedBlock, module: str, lanes: Sequence[Lane]) -> list[Tensor]:
    """The tokens (n, in) of each batch that a linear of the smoothed block reads."""
    taken: list[Tensor] = []
    before = {name: p.detach().clone() for name, p in block.module.named_parameters()}
    smoothed.smoothing.apply_to(block.module)
    hook = block.module.get_submodule(module).register_forward_pre_hook(
        lambda module, args: taken.append(args[0].flatten(0, -2).clone())
    )
    for lane in lanes:
        lane.rehearse(lambda call: call.run())
    hook.remove()
    for name, parameter in before.items():
        block.module.get_parameter(name).detach().copy_(parameter)
    return taken


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"scheme": "w8a8", "smooth": 0.5}),
        ("llama", {"scheme": "w8a8-static-asym", "smooth": "auto"}),
        ("llama", {"scheme": "w8a8", "migration_scale": "always", "format": "qlinear"}),
        ("phi", {"scheme": W4A8, "smooth": "off"}),
    ],
    ids=["llama", "static", "kept", "phi"],
)
def test_it_is_what_rounding_makes_of_what_the_smoothed_block_reads(
    architecture: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "model", architecture, **SMALL)
    if architecture == "llama":
        edit_weights(source, with_outliers)
    watched = Watched(monkeypatch)
    qlinear.quantize(source, tmp_path / "out", calibration=IDS, algorithm="gptq", **options)
    linears = {name for name in watched.seen if name.startswith("model.layers.1.")}
    assert len(linears) == 4  # what is read: by q, k and v; o; gate and up, or fc1; down, or fc2
    assert all(first.tokens + second.tokens == IDS.numel() for first, second in watched.seen.values())


@pytest.mark.parametrize(
    "options",
    [{"scheme": "w8a16"}, {"scheme": "w8a8", "propagate": False}, {"scheme": "w8a8", "algorithm": "rtn"}],
    ids=str,
)
def test_nothing_is_fitted_where_no_input_is_rounded_or_no_codes_are_chosen_by_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, watched = save_model(tmp_path / "model", **SMALL), Watched(monkeypatch)
    qlinear.quantize(source, tmp_path / "out", calibration=IDS, **({"algorithm": "gptq"} | options))
    assert watched.calls
    assert not watched.seen


def test_what_is_too_wide_for_it_is_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, watched = save_model(tmp_path / "model", **SMALL), Watched(monkeypatch)
    monkeypatch.setattr("qlinear.pipeline.options._WIDEST", 32)  # the input of down_proj has 48 channels
    qlinear.quantize(source, tmp_path / "out", scheme="w8a8", calibration=IDS, algorithm="gptq")
    assert {name.rpartition(".")[2] for name in watched.seen} == {"q_proj", "o_proj", "gate_proj"}


def test_experts_in_a_stack_keep_to_the_inputs_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    save_model(tmp_path / "model", "qwen3_moe", **SMALL, **experts)
    watched = Watched(monkeypatch)
    qlinear.quantize(tmp_path / "model", tmp_path / "out", scheme="w8a8", calibration=IDS, algorithm="gptq")
    assert {name.rpartition(".")[2] for name in watched.seen} == {"q_proj", "o_proj"}
