"""Whether a block's real smoothing leaves its output as it was, before anything is written.

`tracing.proof` proves folds with random powers of two. This check is the last one: the vectors that were chosen, on the
tokens of the proof, in float32. What fails is found at its block, where the fold can still be undone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..streaming.float32 import float32_call, in_float32, tensors_of
from ..streaming.lanes import Call, Lane
from ..tracing.experiment import Trace, observe
from ..tracing.folds import Fold
from .block import Block
from .refine_block import hidden_state
from .smoothing import Smoothing

# Relative difference that float32 arithmetic may cause; the stored biases are rounded besides.
_FLOAT32_NOISE = 1e-3


@dataclass(frozen=True, slots=True)
class FoldCheck:
    """The proof's call of a block, and the original block's output for it, both in float32.

    traced: the output of the trace, in which every expert gets its share of the tokens.
    """

    call: Call
    expected: Tensor
    traced: Tensor

    @classmethod
    def run(cls, proof: Lane, trace: Trace) -> tuple["FoldCheck", Any]:
        """Run the block that is in memory, in float32, on what the proof lane waits with, which stays.

        trace: of the block on the same tokens. Returns the check, and the block's output for the lane to continue with.
        """
        call = float32_call(proof.waiting)
        before = call.copied()
        output = call.run()
        return cls(before, hidden_state(output).clone(), trace.returned[0]), output

    def agrees(self, block: Block) -> bool:
        """Whether the block that is in memory, smoothed and in float32, gives the expected output."""
        with torch.no_grad():
            return self._is_near(block, self.expected, hidden_state(self.call.copied().run()))

    def holds(self, block: Block, smoothing: Smoothing) -> bool:
        """Whether a smoothing leaves the output of the unsmoothed block in memory, without a copy of its weights.

        Columns multiply what a weight reads, and rows divide what it gives; only gains are changed meanwhile.
        """
        biases = {
            group.fold.producer.bias for group in block.groups if group.fold and group.fold.producer.weight
        }
        gains = {name: vector for name, vector in smoothing.vectors.items() if name not in biases}
        columns = {w: s for w, s in smoothing.columns.items() if w not in smoothing.migration}
        rows = {weight: 1 / s for weight, s in smoothing.rows.items()}
        with in_float32(tensors_of(block.module)), Smoothing(vectors=gains).applied_to(block.module):
            call = self.call
            trace = observe(block.module, call.forward, call.args, call.kwargs, columns, rows)
        return self._is_near(block, self.traced, trace.returned[0])

    def wrong_folds(self, block: Block, smoothing: Smoothing) -> list[Fold]:
        """The folds whose vectors change the output, each alone; all of them where only their sum does."""
        folds = [
            group.fold for group in block.groups if group.fold is not None and _is_used(group.fold, smoothing)
        ]
        return [fold for fold in folds if not self.holds(block, _only(smoothing, [fold]))] or folds

    def _is_near(self, block: Block, expected: Tensor, actual: Tensor) -> bool:
        """Whether two outputs are alike in what they add to the block's input."""
        hidden = self.call.hidden
        added = [t - hidden if hidden.shape == t.shape else t for t in (expected, actual)]
        dtypes = {block.stored_dtype(name) for name, p in block.module.named_parameters() if p.dim() == 1}
        limit = _FLOAT32_NOISE + 4 * max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        return relative_difference(*added) <= limit


def _is_used(fold: Fold, smoothing: Smoothing) -> bool:
    return any(reader.weight in smoothing.folded_into for reader in fold.readers)


def _only(smoothing: Smoothing, folds: Sequence[Fold]) -> Smoothing:
    """The part of a smoothing that some folds make."""
    readers = {reader.weight for fold in folds for reader in fold.readers}
    producers = {fold.producer.weight for fold in folds}
    names = {name for fold in folds for name in (*fold.producer.gain, fold.producer.bias)}
    return replace(
        smoothing,
        columns={w: s for w, s in smoothing.columns.items() if w in readers},
        rows={w: s for w, s in smoothing.rows.items() if w in producers},
        migration={},
        vectors={name: vector for name, vector in smoothing.vectors.items() if name in names},
    )


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """|actual - expected| / |expected|, in float32."""
    a, b = expected.float(), actual.float()
    return float((a - b).norm() / a.norm().clamp(min=torch.finfo(torch.float32).tiny))


def median_difference(expected: Tensor, actual: Tensor) -> float:
    """The relative difference of the median token; both (*, hidden).

    A mixture's router may send a few tokens to other experts for a difference in the last bit. A wrong fold changes
    all tokens.
    """
    a, b = expected.float().flatten(0, -2), actual.float().flatten(0, -2)
    return float(((a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)).median())


def rounding_limit(checkpoint: Checkpoint) -> float:
    """The relative difference that the rounding of stored biases may cause over a whole model."""
    stored = {info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point}
    return _FLOAT32_NOISE + 4 * max(torch.finfo(dtype).eps for dtype in stored)
