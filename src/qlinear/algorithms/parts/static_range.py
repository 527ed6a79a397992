"""How much of its range a static input is given.

One scale serves all tokens. A range that holds the rarest value makes coarse steps for all others; one that holds what
few tokens showed cuts off what others will. So shares of it are tried, both ends moved alike:

    minimise over r   Σ_W |x Wᵀ - A_r(x) Wᵀ|²       A_r rounds with r times the range

The sum is over a sample of tokens, and the range is that of other sequences: that of the sample itself would cut off
nothing of it. The share that was found is then one of the range of all tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..base import Group

# The nearest to the whole range first.
SHARES = (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 1.4, 0.6, 1.6, 0.5, 2.0, 0.4, 0.3, 0.2)


def choose_static_range(group: Group) -> Group:
    """The group with the range of its static input narrowed to where its outputs lose least, or widened: no further
    than what is lost on the sample differs by more than chance, one standard error over its tokens."""
    if len(group.sample) < 2:
        return group
    others, exact = group.without_sample(), [group.sample @ matrix.T for matrix in group.weights.values()]

    def lost(share: float) -> Tensor:
        x = _ranged(others, share).quantized_sample()
        each = (
            torch.addmm(y, x, matrix.T, beta=-1).square_().sum(1)
            for y, matrix in zip(exact, group.weights.values(), strict=True)
        )
        return torch.stack(list(each)).sum(0)

    lost_by_token = torch.stack([lost(share) for share in SHARES])
    more = lost_by_token - lost_by_token[lost_by_token.sum(1).argmin()]
    by_chance = more.mean(1) <= more.std(1) / len(group.sample) ** 0.5
    return _ranged(group, SHARES[int(by_chance.float().argmax())])


def _ranged(group: Group, share: float) -> Group:
    """The group with so much of its input's range; zero stays where it is."""
    return replace(group, low=group.low * share, high=group.high * share)
