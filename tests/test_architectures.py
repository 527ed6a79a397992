"""Smoothing leaves the logits of an architecture as they were, and misses no weight that multiplies in its blocks."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlinear.blocks import Lane, Lanes, batches_of, find_blocks
from qlinear.calibrate import absmax_of, calibrate
from qlinear.smooth import Smoothing, group_scale
from qlinear.structure import Fold, InputGroup, examine, find_groups

from .architectures import small_model

TOKENS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))

# One of each kind: plain, biased, 1 + gain, fused, parallel, sandwiched, transposed, clipped, without gains, with
# latent attention, with experts in a list, in a stack, batched, or with a bias; and how many of the weights fold.
KINDS = {
    "Llama": 14, "Qwen2": 14, "Qwen3": 14, "Gemma2": 14, "Gemma3Text": 14, "Phi3": 8, "Falcon": 6, "GPTNeoX": 6,
    "Cohere": 14, "Olmo": 2, "Olmo2": 4, "OPT": 12, "GPT2": 6, "Bloom": 6, "StableLm": 14, "Mixtral": 26, "GptOss": 18,
    "Llama4Text": 64, "Nemotron": 8, "Arcee": 10,
}  # fmt: skip


def smooth_block(
    block: nn.Module, lanes: list[Lane], likely: list[Fold]
) -> tuple[list[Fold], list[InputGroup]]:
    """What the job does to a block, without rounding; returns the folds, and all groups."""
    probe, proof, *calibration = lanes
    trace, folds = examine(block, probe.waiting, proof.waiting, likely)
    stats = calibrate(block, [*calibration, probe, proof], trace)
    groups = find_groups(trace, folds)
    smoothing = Smoothing()
    vectors = [
        group_scale(g, {w: w.of(block) for w in g.weights}, absmax_of(stats, g.weights), 0.5) for g in groups
    ]
    for group, s in zip(groups, vectors, strict=True):
        if group.fold is not None:
            smoothing.fold(block, group.fold, s, torch.float32)
    for weight in {w for g in groups for w in g.weights if smoothing.touches(w)}:
        matrix = weight.of(block).detach()
        matrix.copy_(smoothing.apply(weight, matrix))
    return folds, groups


@pytest.mark.parametrize("name", KINDS)
def test_smoothing_keeps_the_logits_and_misses_nothing(name: str) -> None:
    model = small_model(getattr(transformers, f"{name}Config"))

    def logits() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(TOKENS, use_cache=False).logits
        return result

    expected = logits()
    blocks, head, folded = find_blocks(model), model.get_output_embeddings(), 0
    batches = [*batches_of(TOKENS.flatten()[:32].unsqueeze(1), 32), *batches_of(TOKENS[:2, :16], 2)]
    likely: list[Fold] = []
    with torch.no_grad(), Lanes(model, [*blocks.values(), head], [*batches, *batches_of(TOKENS, 4)]) as lanes:
        while (block := lanes.at) is not None and block is not head:
            likely, groups = smooth_block(block, list(lanes), likely)
            seen = {weight.module for group in groups for weight in group.weights}
            missed = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)} - seen
            assert not missed, "a weight that multiplies is in a group, or the group is wrong"
            folded += sum(len(group.weights) for group in groups if group.fold is not None)
    assert float((logits() - expected).norm() / expected.norm()) < 1e-4
    assert folded >= KINDS[name], "what folded once folds"
