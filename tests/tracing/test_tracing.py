"""Who feeds whom is found by running, and a wrong fold cannot pass the proof."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlinear.streaming.find_blocks import shared_parameters
from qlinear.streaming.lanes import Call
from qlinear.tracing.experiment import Trace
from qlinear.tracing.find_folds import Finder
from qlinear.tracing.folds import Fold, InputGroup, find_groups
from qlinear.tracing.proof import find_and_prove_folds, prove, proved, reversible

WIDTH, HEADS, KV_HEADS = 32, 4, 2
HEAD = WIDTH // HEADS


def perturbed(module: nn.Module) -> nn.Module:
    """With no gain at 1 and no bias at 0, so that nothing is trivially right."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.data += torch.randn_like(p) * 0.2
    return module.eval()


class Attention(nn.Module):
    """Grouped-query attention; `clip` clamps what the projections give, as OLMo's clip_qkv does."""

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


class Block(nn.Module):
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
    """A run of the block, the folds that experiments suggest, and those that are proved."""
    finder = Finder(block, call_of(block, 16, 1, **kwargs))
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


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), OnePlusNorm])
def test_every_fold_of_a_gated_block_is_found_and_proved(norm: Callable[[], nn.Module]) -> None:
    block = perturbed(Block(norm))
    trace, _, folds = folds_of(block)
    assert described(find_groups(trace, folds)) == EVERYTHING
    assert prove(block, call_of(block, 2, 8), folds), "folds that hold one by one hold together"


def test_value_heads_are_mapped_to_the_query_heads_that_repeat_them() -> None:
    _, _, folds = folds_of(perturbed(Block()))
    (reader,) = next(fold.readers for fold in folds if fold.producer.name == "attention.v")
    expected = (
        torch.arange(KV_HEADS * HEAD).view(KV_HEADS, 1, HEAD).expand(-1, HEADS // KV_HEADS, -1).flatten()
    )
    assert torch.equal(reader.channels, expected)


def test_the_one_plus_norm_is_told_from_the_plain_one() -> None:
    for norm, offset in ((OnePlusNorm, 1.0), (lambda: nn.RMSNorm(WIDTH), 0.0)):
        _, _, folds = folds_of(perturbed(Block(norm)))
        assert {fold.producer.offset for fold in folds if fold.producer.gain} == {offset}


class Fused(Block):
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


class Relu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x)) - 3))


class ReluFromLinear(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x))))


def test_a_linear_folds_through_a_relu_but_not_through_a_shifted_one() -> None:
    with_relu, shifted = perturbed(ReluFromLinear()), perturbed(Relu())
    # Channels that the ReLU silences on every token are mapped as well.
    with_relu.up.bias.data[:5] = -50
    _, _, folds = folds_of(with_relu)
    (down,) = next(fold.readers for fold in folds if fold.producer.name == "up")
    assert torch.equal(down.channels, torch.arange(48))
    _, _, folds = folds_of(shifted)
    assert "up" not in {fold.producer.name for fold in folds}


class HiddenConsumer(Block):
    """The norm's output is also added to the result, where no weight sees it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.down(self.middle(self.gate(h), self.up(h))) + 1e-3 * h.roll(1, -1)


class SharedValues(Block):
    """Leaves its values in a dict for a later block."""


class KeptValues(Block):
    """Leaves its values in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        y = super().forward(x, shared)
        self.values = shared["v"]
        return y


def refused(block: nn.Module, name: str, **kwargs: object) -> bool:
    """Whether the fold into `name` was suggested, and not proved."""
    _, guessed, folds = folds_of(block, **kwargs)
    assert name in {fold.producer.name for fold in guessed}, "the trap has to be walked into"
    return name not in {fold.producer.name for fold in folds}


def test_a_producer_with_a_hidden_second_consumer_is_refused() -> None:
    assert refused(perturbed(HiddenConsumer()), "norm2")


def test_a_hidden_consumer_behind_a_large_residual_is_refused() -> None:
    block = perturbed(HiddenConsumer())
    call = call_of(block, 2, 8)
    call.args[0][..., 0] = 1e6
    _, guessed, _ = folds_of(block)
    fold = next(fold for fold in guessed if fold.producer.name == "norm2")
    assert not prove(block, call, [fold])


def test_a_producer_that_a_later_block_reads_is_refused() -> None:
    assert refused(perturbed(SharedValues()), "attention.v", shared={})
    assert refused(perturbed(KeptValues()), "attention.v")


def test_a_clamp_that_bites_only_at_large_values_is_refused() -> None:
    block, free = perturbed(Block(clip=150.0)), perturbed(Block())
    call = call_of(block, 2, 8)
    v = block.attention.v(block.norm1(call.args[0]))
    assert v.abs().max() < 150 / 2**4, "it does not bite on these tokens"
    _, _, folds = folds_of(free)
    fold = next(fold for fold in folds if fold.producer.name == "attention.v")
    assert prove(free, call_of(free, 2, 8), [fold])
    assert not prove(block, call, [fold])


class Squared(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


def test_a_squared_relu_takes_the_root() -> None:
    _, _, folds = folds_of(perturbed(Squared()))
    (reader,) = next(fold.readers for fold in folds if fold.producer.name == "up")
    assert reader.degree == 2
    assert torch.equal(reader.spread(torch.full((48,), 3.0)), torch.full((48,), 9.0))


class Gated(Block):
    """What the norm gives is weighed by a linear of its own, before others read it; a mixture's router is alike."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.attention(h * self.weigh(h).sigmoid())


def test_a_gate_that_reads_the_norm_hides_nothing() -> None:
    trace, _, folds = folds_of(perturbed(Gated()))
    readers = ("weigh", "attention.q", "attention.k", "attention.v")
    assert (readers, "norm2") in described(find_groups(trace, folds))


class Thirds(Block):
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


class OnTheLeft(Block):
    """A weight that multiplies from the left, and a stack of weights that is held as one matrix."""

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


def test_a_weight_that_another_block_holds_is_left_alone() -> None:
    first, second = perturbed(Block()), perturbed(Block())
    second.up = first.up
    shared = shared_parameters([first, second])
    assert shared[first] == {"up.weight", "up.bias"}
    _, folds = find_and_prove_folds(first, call_of(first, 16, 1), call_of(first, 2, 8), (), shared[first])
    assert {fold.producer.name for fold in folds} == {"norm1", "attention.v"}


def test_what_the_block_before_lacked_is_looked_for() -> None:
    bare, block = perturbed(Block()), perturbed(Block())
    bare.norm1 = nn.Identity()
    _, previous_folds = find_and_prove_folds(bare, call_of(bare, 16, 1), call_of(bare, 2, 8))
    assert {fold.producer.name for fold in previous_folds} == {"norm2", "attention.v", "up"}
    trace, folds = find_and_prove_folds(block, call_of(block, 16, 1), call_of(block, 2, 8), previous_folds)
    assert described(find_groups(trace, folds)) == EVERYTHING


def test_without_producers_weights_are_grouped_by_the_tensor_they_read() -> None:
    trace, _, _ = folds_of(perturbed(Block()))
    assert {tuple(w.module for w in g.weights) for g in find_groups(trace, [])} == {g for g, _ in EVERYTHING}


def test_experiments_leave_the_block_as_it_was() -> None:
    block = perturbed(Block(OnePlusNorm))
    before = {name: p.clone() for name, p in block.named_parameters()}
    folds_of(block)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


class Einsums(Block):
    """Raw parameters multiplied by einsum: as linear layers, stored either way, and as what none is."""

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


class Plain(Block):
    """One up projection, and a nonlinearity that keeps some sizes and no sign."""

    def __init__(self, power: int) -> None:
        super().__init__()
        del self.gate
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.relu(self.up(self.norm2(x))) ** self.power)


@pytest.mark.parametrize("power", [1, 2])
def test_a_fold_behind_a_relu_holds_for_sizes_and_not_for_signs(power: int) -> None:
    block = perturbed(Plain(power))
    _, _, folds = folds_of(block)
    assert "up" in {fold.producer.name for fold in folds}
    turning = reversible(block, call_of(block, 2, 8), folds)
    assert {fold.producer.name for fold in turning} == {"norm1", "norm2", "attention.v"}


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), OnePlusNorm])
def test_every_fold_of_a_gated_block_holds_for_signs(norm: Callable[[], nn.Module]) -> None:
    block = perturbed(Block(norm))
    _, _, folds = folds_of(block)
    assert reversible(block, call_of(block, 2, 8), folds) == folds
