"""`qlinear evaluate`: perplexity, and how far a model's next-token distribution is from the original's.

Both models are streamed, one block of one model in memory at a time. They meet at their output heads, where the
logits of each sequence are compared. So the two need not fit in memory together, nor even alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Source
from ..errors import DataError, NumericsError
from ..runtime.device import CPU, as_device
from ..streaming.lanes import Lane, Lanes, batches_of
from ..streaming.open_model import evaluation_ids, open_model
from ..streaming.streamed_model import StreamedModel

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity over the evaluation text, and with a reference what changed.

    perplexity, reference_perplexity: exp of the mean negative log-likelihood per token. kl, kl_p99: mean and 99th
    percentile over tokens of KL(reference || model), in nats. top1_agreement: share of tokens whose likeliest next
    token is the same. tokens: how many were predicted. sequence_kl: the mean of each sequence, for comparing two
    evaluations of the same text in pairs. kl_error: the standard error of `kl`, over sequences, since tokens of one
    text go wrong together; None of a single one. The reference's are None, and sequence_kl empty, without one. dtype:
    what both models were computed in.
    """

    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    kl_p99: float | None
    top1_agreement: float | None
    tokens: int
    kl_error: float | None = None
    sequence_kl: tuple[float, ...] = ()
    dtype: str = "float32"


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    data: Source = "demo",
    tokens: int = 16384,
    seq_len: int = 512,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = CPU,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Perplexity of a checkpoint, quantized or not, on a text; with a reference how far it moved from that.

    model, reference: checkpoint folders, Hub ids, or "demo". data: text, as for `quantize`'s calibration, or token ids
    (n, seq_len). tokens: how many of it are read, in sequences of seq_len. dtype: what both models compute in, float32
    if None: the figures do not depend on the processor then. device: what it is computed on, "cpu" or "cuda".
    Raises QLinearError before any work.
    """
    dtype = torch.float32 if dtype is None else dtype
    where = as_device(device)
    opened = open_model(model, dtype, trust_remote_code, revision, where)
    original = None if reference is None else open_model(reference, dtype, trust_remote_code, device=where)
    sizes = [m.model.config.get_text_config().vocab_size for m in (opened, original) if m]
    if len(set(sizes)) > 1:
        raise DataError(
            f"model and reference must share a vocabulary; theirs have {sizes[0]} and {sizes[1]} tokens"
        )
    return compare(opened, evaluation_ids(data, opened, tokens, seq_len), original, progress)


def compare(
    model: StreamedModel,
    tokens: Tensor,
    reference: StreamedModel | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Evaluate `model` on token ids (n, seq_len), n at least 1, against `reference` if there is one."""
    models = [model] if reference is None else [model, reference]
    batches = batches_of(tokens, 1)
    scores: list[Scores] = []
    with ExitStack() as stack, torch.no_grad():
        arrived = [stack.enter_context(at_heads(streamed, batches, progress)) for streamed in models]
        for i, batch in enumerate(batches):
            logits = [
                _logits(lanes[i], head, streamed)
                for (lanes, head), streamed in zip(arrived, models, strict=True)
            ]
            scores.append(score(batch["input_ids"].to(model.device), *logits))
            progress("comparing outputs", i + 1, len(batches))
    return replace(_summary(scores), dtype=str(model.dtype).removeprefix("torch."))


@contextmanager
def at_heads(
    model: StreamedModel, batches: Sequence[Mapping[str, Any]], progress: Progress
) -> Iterator[tuple[Lanes, nn.Module]]:
    """Context manager: the batches have passed every block, and wait before the output head, which is in memory."""
    with model.lanes(batches) as lanes:
        while (block := lanes.at) is not None and block is not model.head:
            progress(f"running {model.name}", model.position(block), len(model.blocks))
            with model.loaded(block):
                for lane in lanes:
                    lane.step()
        progress(f"running {model.name}", len(model.blocks), len(model.blocks))
        with model.loaded(model.head) as head:
            yield lanes, head


def _logits(lane: Lane, head: nn.Module, model: StreamedModel) -> Tensor:
    """Run a lane through the head to its end. Returns the logits (batch, seq_len, vocabulary), in the model's dtype.

    Raises NumericsError where the largest logit of a token is NaN or infinite. Single logits may be minus infinity,
    by which models exclude a token.
    """
    while lane.call is not None:
        lane.step(head)
    output, lane.output = lane.output, None
    logits: Tensor = output.logits
    bad = int((~logits.amax(-1).isfinite()).sum())
    if bad:
        wider = "" if model.dtype == torch.float32 else ": run it in a wider dtype with --dtype float32"
        raise NumericsError(
            f"the logits of {model.name} reached NaN or infinity at {bad} of {logits[..., 0].numel()} tokens{wider}"
        )
    return logits


@dataclass(frozen=True, slots=True)
class Scores:
    """Per predicted token, each (tokens,) float32: negative log-likelihoods, the divergence, and agreement."""

    loss: Tensor
    reference_loss: Tensor | None = None
    kl: Tensor | None = None
    agrees: Tensor | None = None


def score(ids: Tensor, logits: Tensor, reference: Tensor | None = None) -> Scores:
    """Scores of logits (batch, seq_len, vocabulary) as predictions of each next token of ids (batch, seq_len)."""
    targets = ids[:, 1:].reshape(-1, 1)
    log_p = _log_probabilities(logits)
    loss = -log_p.gather(1, targets).squeeze(1)
    if reference is None:
        return Scores(loss)
    log_q = _log_probabilities(reference)
    # KL(reference || model), summed over the vocabulary.
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    agrees = (log_p.argmax(1) == log_q.argmax(1)).float()
    return Scores(loss, -log_q.gather(1, targets).squeeze(1), kl, agrees)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits[:, :-1].flatten(0, 1).float().log_softmax(-1)


def _summary(scores: Sequence[Scores]) -> Evaluation:
    loss = torch.cat([s.loss for s in scores])
    reference = _joined([s.reference_loss for s in scores])
    kl, agrees = _joined([s.kl for s in scores]), _joined([s.agrees for s in scores])
    per_sequence = tuple(float(s.kl.double().mean()) for s in scores if s.kl is not None)
    return Evaluation(
        perplexity=float(loss.double().mean().exp()),
        reference_perplexity=None if reference is None else float(reference.double().mean().exp()),
        kl=None if kl is None else float(kl.double().mean()),
        kl_p99=None if kl is None else float(kl.kthvalue(max(1, round(0.99 * len(kl)))).values),
        top1_agreement=None if agrees is None else float(agrees.double().mean()),
        tokens=len(loss),
        kl_error=standard_error(per_sequence) if len(per_sequence) > 1 else None,
        sequence_kl=per_sequence,
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values: their standard deviation over the root of their number."""
    return float(stdev(values) / len(values) ** 0.5)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
