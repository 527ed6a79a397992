"""The range of a static input.

One scale serves all tokens. A range that holds the rarest value makes coarse steps for all others. A range that holds
only what few tokens showed clips the values of other tokens. So several shares of the range are tried, both ends alike:

    minimise over r   Σ_W |x Wᵀ - A_r(x) Wᵀ|²       A_r rounds with r times the range

Tuning a range on the tokens it was measured on overfits: the range of the sample clips nothing of the sample. So errors
come from a sample of tokens, and ranges from other sequences. The share that wins is then applied to the range of all
tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..base import Group

# The closest to the whole range first.
SHARES = (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 1.4, 0.6, 1.6, 0.5, 2.0, 0.4, 0.3, 0.2)


def choose_static_range(group: Group) -> Group:
    """The group with the range of its static input scaled to the share of least output error.

    The first of `SHARES` wins whose error on the sample is within one standard error, over tokens, of the least.
    """
    if len(group.sample) < 2:
        return group
    others, exact = group.without_sample(), [group.sample @ matrix.T for matrix in group.weights.values()]

    def error_by_token(share: float) -> Tensor:
        x = _scaled_range(others, share).quantized_sample()
        errors = (
            torch.addmm(y, x, matrix.T, beta=-1).square_().sum(1)
            for y, matrix in zip(exact, group.weights.values(), strict=True)
        )
        return torch.stack(list(errors)).sum(0)

    errors = torch.stack([error_by_token(share) for share in SHARES])
    excess = errors - errors[errors.sum(1).argmin()]
    by_chance = excess.mean(1) <= excess.std(1) / len(group.sample) ** 0.5
    return _scaled_range(group, SHARES[int(by_chance.float().argmax())])


def _scaled_range(group: Group, share: float) -> Group:
    """The group with both ends of its input's range multiplied by `share`."""
    return replace(group, low=group.low * share, high=group.high * share)
