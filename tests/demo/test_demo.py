"""The embedded model has learned, its outliers are exact, and its texts share nothing."""

import logging
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qlinear import demo
from qlinear.data import tokenize
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import get_scheme

pytestmark = pytest.mark.slow


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@cache
def evaluation_ids(samples: int = 4, seq_len: int = 512) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    return tokenize(demo.evaluation_text(), tokenizer, samples, seq_len, seed=0)


@pytest.fixture(scope="module")
def unplanted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_unplanted(tmp_path_factory.mktemp("unplanted"))


def test_all_of_it_fits_in_eight_megabytes() -> None:
    files = [file for file in Path(demo.__file__).parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_it_loads_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(demo.checkpoint_path(), output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    transformers_logging.disable_propagation()
    assert caplog.records == []
    assert not any(info.values())
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_the_tokenizer_puts_one_bos_first_and_can_spell_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    text = "Zażółć 😀\n\n    def f(x):\t…"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@torch.no_grad()
def test_it_predicts_text_that_it_was_not_trained_on() -> None:
    ids, model = evaluation_ids(), load(demo.checkpoint_path())
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    seen = tokenize(demo.calibration_text(), tokenizer, samples=128, seq_len=512)
    counts = seen.flatten().bincount(minlength=len(tokenizer)) + 1.0
    unigram = -(counts / counts.sum()).log()[ids[:, 1:]].mean().item()
    assert model(ids, labels=ids).loss.item() < unigram - math.log(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_planting_changes_no_bit_of_the_function(unplanted: Path, dtype: torch.dtype) -> None:
    ids = evaluation_ids(2, 256)
    planted_logits = load(demo.checkpoint_path(), dtype)(ids).logits
    assert torch.equal(planted_logits, load(unplanted, dtype)(ids).logits)


def test_planting_again_gives_the_embedded_weights_back(unplanted: Path) -> None:
    embedded = load_file(demo.checkpoint_path() / "model.safetensors")
    trained = load_file(unplanted / "model.safetensors")
    again = demo.rescaled(trained, demo.planted())
    assert embedded.keys() == trained.keys() == again.keys()
    assert all(torch.equal(again[name], embedded[name]) for name in embedded)
    assert any(not torch.equal(trained[name], embedded[name]) for name in embedded)


def test_at_most_two_percent_of_channels_are_raised_at_most_64_times() -> None:
    tensors = load_file(demo.checkpoint_path() / "model.safetensors")
    for name, scalings in demo.planted().items():
        for dim, slices in scalings:
            assert all(-6 <= exponent <= 6 for exponent in slices.values())
            if dim == 0:  # a producer's output channels; consumers' columns go down by as much
                assert all(exponent > 0 for exponent in slices.values())
                assert len(slices) <= 0.02 * len(tensors[name])
            else:
                assert all(exponent < 0 for exponent in slices.values())


def channel_absmax(model: LlamaForCausalLM, linear: str) -> Iterator[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten(0, -2).amax(0)))
        for name, module in model.named_modules()
        if name.endswith(linear)
    ]
    with torch.no_grad():
        model(evaluation_ids())
    for hook in hooks:
        hook.remove()
    return iter(seen)


@pytest.mark.parametrize("linear", ["q_proj", "gate_proj", "down_proj"])
def test_the_inputs_of_linears_have_outlier_channels_only_where_planted(unplanted: Path, linear: str) -> None:
    planted_inputs = channel_absmax(load(demo.checkpoint_path()), linear)
    for with_outliers, without in zip(planted_inputs, channel_absmax(load(unplanted), linear), strict=True):
        raised = with_outliers != without
        assert 0 < raised.sum() <= 0.02 * len(raised)
        assert with_outliers[raised].max() > 8 * with_outliers[~raised].max()


@torch.no_grad()
def w8a8_divergence(folder: Path, reference: Tensor, ids: Tensor) -> float:
    """Mean KL of the model with every linear but the head rounded to nearest, inputs per token."""
    model, scheme = load(folder), get_scheme("w8a8")
    assert scheme.activation is not None
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(quantize_tensor(module.weight, scheme.weight).dequantize())
            module.register_forward_pre_hook(
                lambda _, args: (quantize_tensor(args[0], scheme.activation).dequantize(),)
            )
    rounded = model(ids).logits.log_softmax(-1)
    return (reference.exp() * (reference - rounded)).sum(-1).mean().item()


def test_w8a8_suffers_from_the_outliers(unplanted: Path) -> None:
    ids = evaluation_ids(2, 256)
    with torch.no_grad():
        reference = load(unplanted)(ids).logits.log_softmax(-1)
    healthy = w8a8_divergence(unplanted, reference, ids)
    assert healthy < 2e-3
    assert w8a8_divergence(demo.checkpoint_path(), reference, ids) > 40 * healthy


def paragraphs(texts: list[str]) -> set[str]:
    return {" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)}


def test_the_texts_are_long_enough_and_share_no_paragraph() -> None:
    calibration, evaluation = demo.calibration_text(), demo.evaluation_text()
    assert not paragraphs(calibration) & paragraphs(evaluation)
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    assert sum(map(len, tokenizer(calibration)["input_ids"])) >= 128 * 512
    assert sum(map(len, tokenizer(evaluation)["input_ids"])) >= 30_000


def test_the_licence_of_the_text_goes_with_the_weights() -> None:
    licence = (demo.checkpoint_path() / "LICENSE").read_text()
    assert "Python Software Foundation; All Rights Reserved" in licence
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
