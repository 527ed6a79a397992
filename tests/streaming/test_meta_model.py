"""A model on meta equals that of from_pretrained in everything but its weights."""

from pathlib import Path

import pytest
import torch

from qlinear.errors import CheckpointError
from qlinear.streaming.meta_model import build_meta_model, load_config

from ..support.many_architectures import ARCHITECTURES, save


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_are_on_meta_and_buffers_are_those_of_from_pretrained(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = save(architecture, tmp_path, dtype)
    model = build_meta_model(tmp_path)
    parameters, wanted = dict(model.named_parameters()), dict(reference.named_parameters())
    assert parameters.keys() == wanted.keys()
    assert all(
        p.is_meta and p.dtype == wanted[n].dtype and p.shape == wanted[n].shape for n, p in parameters.items()
    )
    buffers, wanted = dict(model.named_buffers()), dict(reference.named_buffers())
    assert buffers.keys() == wanted.keys()
    persistent = set(model.state_dict())
    for name, buffer in buffers.items():
        assert buffer.dtype == wanted[name].dtype
        assert name in persistent or torch.equal(buffer, wanted[name])
    assert not model.training


def test_parameters_larger_than_the_machine_take_no_memory(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=1 << 16, intermediate_size=1 << 18, num_local_experts=64, num_hidden_layers=1
    )
    model = build_meta_model(config, torch.bfloat16)
    assert max(parameter.nbytes for parameter in model.parameters()) > 4e12
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_type_that_nobody_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(CheckpointError, match="nonesuch") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="no causal language model"):
        build_meta_model(tmp_path)


def test_code_from_a_checkpoint_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        build_meta_model(tmp_path)
