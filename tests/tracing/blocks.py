"""Small blocks whose folds are known, and helpers to find and describe the folds of a block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlinear.streaming.lanes import Call
from qlinear.tracing.experiment import Trace
from qlinear.tracing.find_folds import FoldFinder
from qlinear.tracing.folds import Fold, InputGroup
from qlinear.tracing.proof import proved

WIDTH, HEADS, KV_HEADS = 32, 4, 2
HEAD = WIDTH // HEADS


def perturbed(module: nn.Module) -> nn.Module:
    """The module with noise on every parameter, so that no gain is 1 and no bias is 0."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.data += torch.randn_like(p) * 0.2
    return module.eval()


class Attention(nn.Module):
    """Grouped-query attention; `clip` clamps the projections' outputs, as OLMo's clip_qkv does."""

    def __init__(self, clip: float | None = None) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * HEAD) for _ in range(2))
        self.clip = clip

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if shared is not None:
            shared["v"] = v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class OnePlusNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class GatedBlock(nn.Module):
    def __init__(
        self, norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(WIDTH), clip: float | None = None
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = norm(), norm(), Attention(clip)
        self.gate, self.up = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)

    def middle(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), shared)
        h = self.norm2(x)
        return x + self.down(self.middle(self.gate(h), self.up(h)))


def call_of(block: nn.Module, batch: int, length: int, **kwargs: object) -> Call:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(2))
    return Call(block, block.forward, (x,), dict(kwargs))


def folds_of(block: nn.Module, **kwargs: object) -> tuple[Trace, list[Fold], list[Fold]]:
    """A run of the block, the folds that experiments suggest, and the proved ones."""
    finder = FoldFinder(block, call_of(block, 16, 1, **kwargs))
    guessed = list(finder.folds())
    return finder.trace, guessed, proved(block, call_of(block, 2, 8, **kwargs), guessed)


def described(groups: list[InputGroup]) -> set[tuple[tuple[str, ...], str | None]]:
    return {(tuple(w.module for w in g.weights), g.fold.producer.name if g.fold else None) for g in groups}


EVERYTHING = {
    (("attention.q", "attention.k", "attention.v"), "norm1"),
    (("attention.o",), "attention.v"),
    (("gate", "up"), "norm2"),
    (("down",), "up"),
}
