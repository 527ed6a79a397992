"""The unit of the algorithms: the weights that read one tensor, and what is known of that tensor.

q, k and v read the same input, as gate and up do: whatever is derived from the input (its second moments and their
factorization, a smoothing vector) is derived once for all of them. Plain tensors and a scheme, nothing of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.rounding import choose_qparams, dequantize, qparams_from_range, quantize
from ..formats.scheme import Scheme


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """What rounding makes of an input x (tokens, in): x̂, and e = x - x̂ lost, over some tokens; float32.

    moment: the mean of x̂ x̂ᵀ (in, in). drift: the mean of e x̂ᵀ (in, in), which is 0 where what is lost has nothing to
    do with what is left. tokens: how many there were.
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
    """Weights that read one tensor x (tokens, in), and statistics of x; all float32 but the codes to come.

    weights: by name, each (out_i, in). low, high, absmean: (in,), the least, the greatest and the mean magnitude of
    each channel of x. sample: some tokens of x (n, in). moment: the mean of x xᵀ over all tokens (in, in), None where
    no algorithm asks for it. scale_dtype: what the weights' scales are rounded to before codes are chosen. others: low
    and high of tokens apart from the sample, None if there are none. rounded_input: what becomes of x as the scheme
    rounds it, of one half of the tokens and of the other; None where that is not known or not done.
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
    def absmax(self) -> Tensor:
        """The largest magnitude of each channel of x (in,)."""
        return torch.maximum(self.high, -self.low)

    def divided(self, s: Tensor) -> "Group":
        """The group with x divided by s (in,), and its weights left as they are: they hold s already."""
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
        """The same group after x is divided by s (in,) and the columns of its weights are multiplied by it."""
        weights = {name: weight * s for name, weight in self.weights.items()}
        return replace(self.divided(s), weights=weights)

    def without_sample(self) -> "Group":
        """The group as the other tokens have it: what a choice may know that is made by the error on the sample."""
        return self if self.others is None else replace(self, low=self.others[0], high=self.others[1])

    def quantized_sample(self) -> Tensor:
        """The sample (n, in) as the layer will see it."""
        return self.rounded(self.sample)

    def rounded(self, x: Tensor) -> Tensor:
        """Tokens x (n, in) as the layer will see them: through the codes of the scheme's activations, if it has any."""
        fmt = self.scheme.activation
        if fmt is None:
            return x
        if fmt.dynamic:
            scale, zero_point = choose_qparams(x, fmt)
        else:
            scale, zero_point = qparams_from_range(self.low.min().view(1), self.high.max().view(1), fmt)
        return dequantize(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt)


def _divided(low: Tensor, high: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A range, each channel of it divided by s (in,), which may be negative."""
    ends = low / s, high / s
    return torch.minimum(*ends), torch.maximum(*ends)
