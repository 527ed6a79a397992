"""Experiments find which norm or weight produces each weight's input, for every structure of a block."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlinear.tracing.folds import find_groups
from qlinear.tracing.proof import prove

from .blocks import (
    EVERYTHING,
    HEAD,
    HEADS,
    KV_HEADS,
    WIDTH,
    GatedBlock,
    OnePlusNorm,
    call_of,
    described,
    folds_of,
    perturbed,
)


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), OnePlusNorm])
def test_every_fold_of_a_gated_block_is_found_and_proved(norm: Callable[[], nn.Module]) -> None:
    block = perturbed(GatedBlock(norm))
    trace, _, folds = folds_of(block)
    assert described(find_groups(trace, folds)) == EVERYTHING
    assert prove(block, call_of(block, 2, 8), folds), "folds that hold one by one hold together"


def test_value_heads_are_mapped_to_the_query_heads_that_repeat_them() -> None:
    _, _, folds = folds_of(perturbed(GatedBlock()))
    (reader,) = next(fold.readers for fold in folds if fold.producer.name == "attention.v")
    expected = (
        torch.arange(KV_HEADS * HEAD).view(KV_HEADS, 1, HEAD).expand(-1, HEADS // KV_HEADS, -1).flatten()
    )
    assert torch.equal(reader.channels, expected)


def test_the_one_plus_norm_is_told_from_the_plain_one() -> None:
    for norm, offset in ((OnePlusNorm, 1.0), (lambda: nn.RMSNorm(WIDTH), 0.0)):
        _, _, folds = folds_of(perturbed(GatedBlock(norm)))
        assert {fold.producer.offset for fold in folds if fold.producer.gain} == {offset}


class Fused(GatedBlock):
    """One projection for queries, keys and values interleaved by head, one for gate and up."""

    def __init__(self) -> None:
        super().__init__()
        del self.attention, self.gate, self.up
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate_up = nn.Linear(WIDTH, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (HEADS, 3, HEAD)).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(self.middle(gate, up))


def test_the_layout_of_fused_projections_is_found() -> None:
    trace, _, folds = folds_of(perturbed(Fused()))
    assert described(find_groups(trace, folds)) == {
        (("qkv",), "norm1"), (("o",), "qkv"), (("gate_up",), "norm2"), (("down",), "gate_up")
    }  # fmt: skip
    (reader,) = next(fold.readers for fold in folds if fold.producer.name == "qkv")
    value_rows = torch.arange(3 * WIDTH).view(HEADS, 3, HEAD)[:, 2].flatten()
    assert torch.equal(reader.channels, value_rows)


class Relu(GatedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x)) - 3))


class ReluFromLinear(GatedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x))))


def test_a_linear_folds_through_a_relu_but_not_through_a_shifted_one() -> None:
    with_relu, shifted = perturbed(ReluFromLinear()), perturbed(Relu())
    # Channels that the ReLU sets to zero on every token are mapped too.
    with_relu.up.bias.data[:5] = -50
    _, _, folds = folds_of(with_relu)
    (down,) = next(fold.readers for fold in folds if fold.producer.name == "up")
    assert torch.equal(down.channels, torch.arange(48))
    _, _, folds = folds_of(shifted)
    assert "up" not in {fold.producer.name for fold in folds}


class Squared(GatedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


def test_a_squared_relu_takes_the_root() -> None:
    _, _, folds = folds_of(perturbed(Squared()))
    (reader,) = next(fold.readers for fold in folds if fold.producer.name == "up")
    assert reader.degree == 2
    assert torch.equal(reader.spread(torch.full((48,), 3.0)), torch.full((48,), 9.0))


class WeighedNorm(GatedBlock):
    """A linear of the norm's output weighs that output before others read it, as a mixture's router does."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.attention(h * self.weigh(h).sigmoid())


def test_a_gate_that_reads_the_norm_is_a_reader_of_it() -> None:
    trace, _, folds = folds_of(perturbed(WeighedNorm()))
    readers = ("weigh", "attention.q", "attention.k", "attention.v")
    assert (readers, "norm2") in described(find_groups(trace, folds))


class Thirds(GatedBlock):
    """One projection for three factors, as in a gated short convolution."""

    def __init__(self) -> None:
        super().__init__()
        del self.attention, self.gate, self.up
        self.fused, self.conv = nn.Linear(WIDTH, 3 * 48), nn.Conv1d(48, 48, 3, groups=48, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.fused(self.norm2(x)).chunk(3, -1)
        y = self.conv((a * b).mT)[..., : x.shape[1]].mT
        return x + self.down(c * y)


def test_a_part_of_a_fused_projection_is_found() -> None:
    _, _, folds = folds_of(perturbed(Thirds()))
    fold = next(fold for fold in folds if fold.producer.name == "fused")
    assert fold.producer.rows == (96, 144, 1)


class OnTheLeft(GatedBlock):
    """A weight that multiplies from the left, and a stack of weights stored as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4 * 48, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        first, second, *_ = (self.stack.view(4, 48, WIDTH)[i] for i in range(4))
        return x + self.down(((first @ h.mT).mT * F.linear(h, second)).tanh())


def test_weights_on_the_left_and_in_a_viewed_stack_are_seen() -> None:
    block = perturbed(OnTheLeft())
    trace, _, folds = folds_of(block)
    groups = find_groups(trace, folds)
    norm = next(group for group in groups if group.fold and group.fold.producer.name == "norm2")
    assert [(w.name, w.index, w.slices) for w in norm.weights] == [("stack", 0, 4), ("stack", 1, 4)]
    assert torch.equal(norm.weights[1].of(block), block.stack[48:96])


def test_without_producers_weights_are_grouped_by_the_tensor_they_read() -> None:
    trace, _, _ = folds_of(perturbed(GatedBlock()))
    assert {tuple(w.module for w in g.weights) for g in find_groups(trace, [])} == {g for g, _ in EVERYTHING}


def test_experiments_leave_the_block_as_it_was() -> None:
    block = perturbed(GatedBlock(OnePlusNorm))
    before = {name: p.clone() for name, p in block.named_parameters()}
    folds_of(block)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


class Einsums(GatedBlock):
    """Raw parameters multiplied by einsum: two layouts of a linear layer, and one product that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate, self.up, self.down
        self.gate, self.up = (
            nn.Parameter(torch.randn(WIDTH, 48) / 6),
            nn.Parameter(torch.randn(48, WIDTH) / 6),
        )
        self.down, self.heads = (
            nn.Parameter(torch.randn(WIDTH, 48) / 7),
            nn.Parameter(torch.randn(WIDTH, HEADS, HEAD)),
        )

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), shared)
        h = self.norm2(x)
        gate, up = torch.einsum("btc,ch->bth", h, self.gate), torch.einsum("...c, hc -> ...h", h, self.up)
        y = torch.einsum("ch,bth->btc", self.down, F.silu(gate) * up)
        return x + y + torch.einsum("btc,cnd->btnd", h, self.heads).flatten(2)


def test_an_einsum_that_is_a_linear_layer_is_one_and_any_other_is_named() -> None:
    block = perturbed(Einsums())
    trace, _, folds = folds_of(block)
    read = {w.name: w for group in find_groups(trace, folds) for w in group.weights}
    assert {name: read[name].transposed for name in ("gate", "up", "down")} == {
        "gate": True,
        "up": False,
        "down": False,
    }
    assert trace.unread == {"heads"}
    assert "norm2" not in {fold.producer.name for fold in folds}, "heads read it too"
    assert next(f for f in folds if f.producer.weight == read["up"]).readers[0].weight == read["down"]
