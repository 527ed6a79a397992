"""The micro-batches of a job, by what they are for: one to find folds, two to prove them, and the calibration set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..streaming.lanes import Lane, batches_of

# Tokens for tracing: many sequences of one token to find folds, a few real sequences to prove them.
_PROBE, _PROOF = 64, (2, 16)
# Tokens that pass through a block at once: enough to fill a matrix product, few enough to stay small.
_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LaneSets:
    """The lanes that stand before a block.

    probe: sequences of one token, to find folds. proof: real sequences through the original blocks. smoothed: the same
    sequences through the smoothed blocks, which must agree with `proof`. calibration: the calibration set of this
    process, as the quantized blocks leave it. originals: the same set through the original blocks, where scales are
    refined towards their output.
    """

    probe: Lane
    proof: Lane
    smoothed: Lane
    calibration: tuple[Lane, ...]
    originals: tuple[Lane, ...]

    @classmethod
    def of(cls, lanes: Sequence[Lane], refines: bool) -> "LaneSets":
        """The lanes in the order of `tracing_batches` and the calibration set, once or, to refine, twice."""
        probe, proof, smoothed, *rest = lanes
        half = len(rest) // 2 if refines else len(rest)
        return cls(probe, proof, smoothed, tuple(rest[:half]), tuple(rest[half:]))


def tracing_batches(tokens: Tensor) -> list[dict[str, Any]]:
    """The first model calls of a job, from the calibration set (n, seq_len): probe, proof, and the proof again."""
    probe, proof = tokens.flatten()[:_PROBE].unsqueeze(1), tokens[: _PROOF[0], : _PROOF[1]]
    return [*batches_of(probe, _PROBE), *batches_of(proof, len(proof)) * 2]


def calibration_batches(tokens: Tensor) -> list[dict[str, Any]]:
    """The calibration set (n, seq_len) as model calls."""
    return batches_of(tokens, rows_at_once(tokens))


def rows_at_once(tokens: Tensor) -> int:
    """How many sequences of a calibration set (n, seq_len) make one model call."""
    return max(1, _BATCH_TOKENS // tokens.shape[1])
