"""Every architecture passes the real job in bfloat16: none is refused for noise, none crashes, all can be loaded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.small_models import CANNOT_BUILD, small_model
from benchmarks.sweep import CLASSES, TOKENS
from transformers import AutoModelForCausalLM

import qlinear
from qlinear import QLinearError

JOBS: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "w4a16": {"scheme": "w4a16-channel", "algorithm": "gptq"},
}
# Classes of a larger model whose text part transformers maps to no causal language model of its own.
NOT_A_CAUSAL_MODEL = {"Emu3", "Mllama"}
# Classes whose own forward mixes dtypes, so that transformers runs them in float32 alone.
FLOAT32_ONLY = {"Reformer", "XLNet", "xLSTM"}
# KL in nats up to which nobody would say that the model is in pieces: random logits are a few nats away.
NEAR = 0.35


def kl_of(source: Path, out: Path, dtype: str, job: str) -> float:
    """Quantize, read back, and compare with the source in float32."""
    result = qlinear.quantize(source, out, calibration=TOKENS, dtype=dtype, format="qlinear", **JOBS[job])
    assert result.layers
    assert all(math.isfinite(layer.error) for layer in result.layers)
    assert not [note for note in result.warnings if "differs from the original's" in note]
    cost = qlinear.evaluate(out, source, data=TOKENS, tokens=128, seq_len=32)
    assert cost.kl is not None
    return cost.kl


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - CANNOT_BUILD - NOT_A_CAUSAL_MODEL - FLOAT32_ONLY))
def test_every_class_passes_the_job_in_bfloat16(name: str, job: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    small_model(CLASSES[name]).to(torch.bfloat16).save_pretrained(source)
    kl = kl_of(source, tmp_path / "out", "bfloat16", job)
    if (
        kl >= NEAR
    ):  # some random models lose as much in float32, where four bits are too few for their channels
        assert kl <= 1.5 * kl_of(source, tmp_path / "float32", "float32", job)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FLOAT32_ONLY))
def test_what_transformers_runs_in_float32_alone_is_refused_in_bfloat16_with_that_advice(
    name: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    small_model(CLASSES[name]).to(torch.bfloat16).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(TOKENS[:1, :16], use_cache=False)
    with pytest.raises(QLinearError, match="run it in float32 with --dtype float32"):
        kl_of(source, tmp_path / "out", "bfloat16", "w8a8")
    assert not (tmp_path / "out").exists()
    assert kl_of(source, tmp_path / "out", "float32", "w8a8") < NEAR
