"""What algorithms work on, and what they return.

Group        weights that read one tensor, with the statistics of that tensor
Codes        the result for one weight
Algorithm    the protocol

q, k and v read the same input, and so do gate and up. Work on the input (its hessian and the factors of that, a
smoothing vector) is done once per group. There are only plain tensors and a scheme here, nothing of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..formats.rounding import QuantizedTensor, fake_quantize_input, input_qparams
from ..formats.scales import global_scale_of
from ..formats.scheme import Scheme

Need = Literal["hessian", "sample", "rounded_input"]


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """How rounding changes an input x (tokens, in): x̂ is the rounded input and e = x - x̂ the error; float32.

    hessian: the mean of x̂ x̂ᵀ (in, in). drift: the mean of e x̂ᵀ (in, in), 0 where the error is uncorrelated with the
    rounded input. tokens: how many the means are over.
    """

    hessian: Tensor
    drift: Tensor
    tokens: int

    def __add__(self, other: "RoundedInput") -> "RoundedInput":
        share = self.tokens / (self.tokens + other.tokens)
        hessian, drift = (
            torch.lerp(b, a, share) for a, b in ((self.hessian, other.hessian), (self.drift, other.drift))
        )
        return RoundedInput(hessian, drift, self.tokens + other.tokens)


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that read one tensor x (tokens, in), and statistics of x; all tensors float32.

    weights: by name, each (out_i, in). low, high, absmean: (in,), the least, the greatest and the mean magnitude of
    each channel of x. sample: some tokens of x (n, in). hessian: the mean of x xᵀ over all tokens (in, in), None if no
    algorithm needs it. scale_dtype: the dtype that the weights' scales are rounded to before codes are chosen. others:
    low and high of tokens apart from the sample, None if there are none. rounded_input: how the scheme's rounding
    changes x, on the first and the second half of the tokens; None if unknown or unused.
    """

    weights: Mapping[str, Tensor]
    scheme: Scheme
    low: Tensor
    high: Tensor
    absmean: Tensor
    sample: Tensor
    hessian: Tensor | None = None
    scale_dtype: torch.dtype = torch.float32
    others: tuple[Tensor, Tensor] | None = None
    rounded_input: tuple[RoundedInput, RoundedInput] | None = None

    @property
    def global_scale(self) -> Tensor | None:
        """The divisor (1,) of stored scales, if the format has one; shared, because engines merge the weights."""
        if not self.scheme.weight.has_global_scale:
            return None
        return global_scale_of(
            torch.stack([torch.maximum(w.amax(), -w.amin()) for w in self.weights.values()]).amax()
        )

    @property
    def absmax(self) -> Tensor:
        """The largest magnitude of each channel of x (in,)."""
        return torch.maximum(self.high, -self.low)

    def divided(self, s: Tensor) -> "Group":
        """The group with x divided by s (in,) and its weights unchanged, for weights that hold s already."""
        low, high = _divided(self.low, self.high, s)
        return replace(
            self,
            low=low,
            high=high,
            others=None if self.others is None else _divided(*self.others, s),
            absmean=self.absmean / s.abs(),
            sample=self.sample / s,
            hessian=None if self.hessian is None else self.hessian / s / s.unsqueeze(-1),
            rounded_input=None,
        )

    def smoothed(self, s: Tensor) -> "Group":
        """The group with x divided by s (in,) and the columns of its weights multiplied by s."""
        weights = {name: weight * s for name, weight in self.weights.items()}
        return replace(self.divided(s), weights=weights)

    def without_sample(self) -> "Group":
        """The group with the ranges of the tokens outside the sample.

        A choice that is made by the error on the sample must not know the range of the sample.
        """
        return self if self.others is None else replace(self, low=self.others[0], high=self.others[1])

    def quantized_sample(self) -> Tensor:
        """The sample (n, in) as the layer will see it."""
        return self.rounded(self.sample)

    def rounded(self, x: Tensor) -> Tensor:
        """Tokens x (n, in) as the layer will see them: rounded as the scheme says, if it rounds inputs."""
        fmt = self.scheme.activation
        if fmt is None:
            return x
        if fmt.dynamic:
            return fake_quantize_input(x, fmt)
        return fake_quantize_input(x, fmt, *input_qparams(self.low.min(), self.high.max(), fmt))


def _divided(low: Tensor, high: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A range with each channel divided by s (in,), which may be negative."""
    ends = low / s, high / s
    return torch.minimum(*ends), torch.maximum(*ends)


@dataclass(frozen=True, slots=True)
class Codes:
    """The result of an algorithm for one weight. note: what a user should know of it, None if nothing."""

    weight: QuantizedTensor
    note: str | None = None


class Algorithm(Protocol):
    """A way from weights to codes; the name decides nothing outside this object.

    name: as `--algorithm` takes it. needs: which statistics of a group it reads; empty for weights alone. propagates:
    whether, by default, each block is calibrated with the output of the quantized blocks before it. default_smooth: the
    smoothing where the user asks for none in particular: SmoothQuant's α, or "awq" for AWQ's own search.
    searches_ranges: whether it chooses the range of a 4-bit tile by error, so that a search for smoothing should too.
    """

    name: str
    needs: frozenset[Need] = frozenset()
    propagates: bool = True
    default_smooth: float | Literal["awq"] = 0.5
    searches_ranges: bool = True

    def quantize(self, group: Group) -> dict[str, Codes]:
        """Codes of each weight of a group, by name. group: smoothed already."""
        ...
