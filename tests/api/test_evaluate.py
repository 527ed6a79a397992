"""What evaluation measures, one block in memory at a time, is what the whole model gives in one go."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qlinear
from qlinear import QLinearError
from qlinear.api.evaluate import score

from ..support.models import edit_weights, save_model, save_tokenizer

IDS = torch.arange(3, 67).reshape(8, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tied head and a tokenizer, and what quantizing it gives."""
    folder = tmp_path_factory.mktemp("models")
    source = save_model(folder / "source", tie_word_embeddings=True)
    save_tokenizer(source)
    qlinear.quantize(source, folder / "out", calibration=IDS)
    return source, folder / "out"


@torch.no_grad()
def log_probabilities(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)


def test_it_gives_what_the_whole_models_give(models: tuple[Path, Path]) -> None:
    source, out = models
    found = qlinear.evaluate(out, source, data=IDS, dtype="float32")
    q = log_probabilities(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval())
    p = log_probabilities(qlinear.load(out, dtype="float32"))
    targets = IDS[:, 1:].reshape(-1, 1)
    kl = (q.exp() * (q - p)).sum(-1)
    assert found.tokens == len(targets)
    assert found.perplexity == pytest.approx(float((-p.gather(1, targets)).mean().exp()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(float((-q.gather(1, targets)).mean().exp()), rel=1e-5)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl_p99 == pytest.approx(float(kl.sort().values[round(0.99 * len(kl)) - 1]), rel=1e-3)
    by_sequence = kl.view(len(IDS), -1).mean(1)
    # Log-probabilities near -4.5 are known to 5e-7 in float32; over seven tokens that does not average out.
    assert found.sequence_kl == pytest.approx(by_sequence.tolist(), rel=1e-3, abs=5e-7)
    assert found.kl_error == pytest.approx(float(by_sequence.std() / len(IDS) ** 0.5), rel=1e-2)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_model_does_not_differ_from_itself(models: tuple[Path, Path]) -> None:
    source, _ = models
    found = qlinear.evaluate(source, source, data=IDS)
    assert (found.kl, found.kl_p99, found.kl_error, found.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def test_without_a_reference_there_is_nothing_to_compare(models: tuple[Path, Path]) -> None:
    found = qlinear.evaluate(models[0], data=IDS)
    assert (found.reference_perplexity, found.kl, found.kl_p99, found.top1_agreement) == (None,) * 4
    assert (found.kl_error, found.sequence_kl) == (None, ())
    assert math.isfinite(found.perplexity)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head_is_the_one_that_predicts(tied: bool, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", tie_word_embeddings=tied)
    ids = torch.arange(3, 45).reshape(3, 14)
    qlinear.quantize(source, tmp_path / "out", calibration=ids, ignore=[])
    streamed = qlinear.evaluate(tmp_path / "out", data=ids, dtype="float32")
    with torch.no_grad():
        logits = qlinear.load(tmp_path / "out", dtype="float32")(ids).logits
    loss = score(ids, logits).loss.double().mean()
    assert streamed.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_one_sequence_has_no_standard_error(models: tuple[Path, Path]) -> None:
    found = qlinear.evaluate(models[1], models[0], data=IDS[:1])
    assert found.kl_error is None
    assert found.sequence_kl == pytest.approx((found.kl,))


def test_text_is_read_from_its_beginning_up_to_the_tokens_asked_for(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    words = " ".join(f"w{i}" for i in IDS.flatten().tolist())
    (tmp_path / "text.txt").write_text(words)
    named = qlinear.evaluate(models[0], data=tmp_path / "text.txt", tokens=32, seq_len=8)
    assert named == qlinear.evaluate(models[0], data=IDS[:4])


def test_another_vocabulary_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", vocab_size=50)
    with pytest.raises(QLinearError, match="97 and 50 tokens"):
        qlinear.evaluate(models[0], other, data=IDS)


def test_logits_that_are_no_numbers_are_an_error_and_not_a_result(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    edit_weights(source, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * torch.nan}))
    with pytest.raises(QLinearError, match=r"logits of source reached NaN or infinity at 8 of 8 tokens"):
        qlinear.evaluate(source, data=IDS)


def test_scores_of_a_worked_example() -> None:
    ids = torch.tensor([[0, 1, 0]])
    p = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [9.0, 9.0]]]).log()
    q = torch.tensor([[[1.0, 1.0], [1.0, 3.0], [0.0, 7.0]]]).log()
    scores = score(ids, p, q)
    assert scores.loss.exp().tolist() == pytest.approx([4 / 3, 2])
    assert scores.kl is not None
    # Σ q ln(q / p): of (1/2, 1/2) from (1/4, 3/4), and of (1/4, 3/4) from (1/2, 1/2).
    first, second = math.log(4 / 3) / 2, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert scores.kl.tolist() == pytest.approx([first, second], abs=1e-6)


def test_a_mixture_whose_config_asks_for_router_logits_is_evaluated(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    source = save_model(tmp_path / "model", "qwen3_moe", output_router_logits=True, **sizes)
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    assert qlinear.evaluate(source, source, data=ids, tokens=32, seq_len=16).kl == 0
