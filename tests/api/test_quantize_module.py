"""quantize_: any module in memory, by what its layers do."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlinear.api.quantize_module import quantize_
from qlinear.errors import SchemeError, StructureError
from qlinear.formats.scheme import Scheme, TensorFormat
from qlinear.nn import QLinear


class Raw(nn.Module):
    """A hand-written linear layer; `layout` and `bias` as its author liked them, under names of no meaning."""

    def __init__(self, layout: str, bias: bool) -> None:
        super().__init__()
        self.kern = nn.Parameter(torch.randn((32, 24) if layout == "in_out" else (24, 32)) / 6)
        self.off = nn.Parameter(torch.randn(24)) if bias else None
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.kern if self.layout == "in_out" else self.kern.t())
        return y if self.off is None else y + self.off


class Gated(nn.Module):
    """Multiplies, but is no linear layer: its output is not x W."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w)


class Recurrent(nn.Module):
    """A hand-written recurrent cell over (batch, time, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep = nn.Linear(32, 24), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 24)
        for step in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, step]) + self.keep(state))
        return state


class Casting(nn.Module):
    """Casts to the dtype of one of its weights, as attention with an indexer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x.to(self.inner.weight.dtype))))


def relative(module: nn.Module, original: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((module(x) - original(x)).norm() / original(x).norm())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a16"])
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_an_mlp_is_quantized_and_says_the_same(scheme: str, smooth: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    original, x = copy.deepcopy(model), torch.randn(200, 32)
    result = quantize_(model, scheme, x, smooth=smooth)
    assert result.module is model
    assert result.replaced == ("0", "2")
    assert not result.left
    assert relative(model, original, x) < 0.03
    assert (model[0].migration_scale is None) == (smooth is None)


def test_without_examples_linears_are_known_by_type() -> None:
    model = nn.ModuleDict({"head": nn.Linear(32, 8), "raw": Raw("in_out", True), "words": nn.Embedding(9, 4)})
    result = quantize_(model)
    assert result.replaced == ("head",)
    assert list(result.left) == ["raw.kern"]


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hand_written_layer_is_recognised_by_what_it_does(
    layout: str, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Raw(layout, bias), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    original, x = copy.deepcopy(model), torch.randn(50, 32).to(dtype)
    result = quantize_(model, "w8a8", x)
    assert result.replaced == ("0", "2")
    assert isinstance(model[0], QLinear)
    assert (model[0].in_features, model[0].out_features) == (32, 24)
    assert (model[0].bias is not None) == bias
    assert relative(model, original, x) < 0.03


def test_transformers_conv1d_is_recognised() -> None:
    model = nn.Sequential(Conv1D(24, 32), nn.ReLU())
    original, x = copy.deepcopy(model), torch.randn(2, 7, 32)
    assert quantize_(model, "w8a8", x).replaced == ("0",)
    assert relative(model, original, x) < 0.03


def test_what_multiplies_and_is_no_linear_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Gated(), nn.GRU(32, 16, batch_first=True))
    result = quantize_(model, "w8a8", torch.randn(2, 5, 32))
    assert result.replaced == ("0",)
    assert set(result.left) == {"1.w", "2.weight_ih_l0", "2.weight_hh_l0"}
    assert "gru" in result.left["2.weight_ih_l0"]


def test_a_recurrent_cell_is_quantized() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    original, x = copy.deepcopy(model), torch.randn(16, 6, 32)
    result = quantize_(model, "w8a8-static", x)
    assert result.replaced == ("read", "keep")
    assert not result.left
    assert relative(model, original, x) < 0.05


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_torchs_encoder_layers_call_what_replaced_their_linears(scheme: str) -> None:
    """In evaluation they would hand the weights themselves, codes by now, to one fused operator."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    original, x = copy.deepcopy(model), torch.randn(3, 5, 32)
    original.use_nested_tensor = False  # torch warns of its own prototype
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    result = quantize_(model, scheme, x)
    assert set(result.replaced) == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    assert {name.rpartition(".")[0] for name in result.left} == {
        f"layers.{i}.self_attn{part}" for i in range(2) for part in ("", ".out_proj")
    }
    assert relative(model, original, x) < 0.03
    with torch.no_grad():
        ours, theirs = (each(x, src_key_padding_mask=mask)[~mask] for each in (model, original))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


class Unused(nn.Module):
    """One of its layers takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize("rows", [0, 5])
def test_static_layers_that_saw_nothing_stay_float_and_are_named(smooth: float | None, rows: int) -> None:
    model = Unused()
    result = quantize_(model, "w8a8-static", torch.randn(rows, 32), smooth=smooth)
    assert result.replaced == (("used",) if rows else ())
    assert type(model.idle) is nn.Linear
    assert result.left["idle.weight"] == "took no part in the examples"
    model = Unused()
    assert quantize_(model, "w8a8", torch.randn(rows, 32), smooth=smooth).replaced == ("used", "idle")
    assert model.idle.migration_scale is None


def test_several_calls_of_every_kind_are_examples() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    examples = [torch.ones(3, 32), (torch.full((2, 32), -2.0),), {"input": torch.full((1, 32), 5.0)}]
    quantize_(model, "w8a8-static", examples)
    torch.testing.assert_close(model[0].input_scale, torch.tensor([5 / 127]))


def test_layers_that_read_one_tensor_share_one_vector() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) * self.k(x).repeat(1, 4))

    model = Heads()
    quantize_(model, "w8a8", torch.randn(20, 32), smooth=0.5)
    assert torch.equal(model.q.migration_scale, model.k.migration_scale)
    assert not torch.equal(model.q.migration_scale, model.o.migration_scale)


def test_smoothing_repairs_an_outlier_channel() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(200, 64)
    x[:, 5] *= 60
    smoothed, original = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model, smoothed, original):
            layer[0].weight[:, 5] /= 60
    quantize_(model, "w8a8", x)
    quantize_(smoothed, "w8a8", x, smooth=0.5)
    assert relative(smoothed, original, x) < relative(model, original, x) / 4


def test_a_shared_layer_stays_shared_and_ignored_ones_stay_float() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 4))
    model.train()
    result = quantize_(model, "w8a8", torch.randn(3, 32), ignore=["3"])
    assert result.replaced == ("0",)
    assert model[0] is model[2]
    assert type(model[3]) is nn.Linear
    assert "linear" in result.left["3.weight"]
    assert model.training
    assert model[0].training


def test_running_statistics_are_not_moved_by_the_examples() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    quantize_(model, "w8a8", torch.randn(30, 32) + 3)
    assert not model[1].running_mean.any()


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w8a8-static", {}, "static activations are chosen from .* give example_inputs"),
        ("w8a8", {"smooth": 0.5}, "smoothing is chosen from"),
        (
            Scheme("w4", TensorFormat("int4", "group", group_size=5)), {},
            r"0: in_features 32 .* leave it out with ignore=\['0'\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_changes(
    scheme: str | Scheme, options: dict[str, float], message: str
) -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(SchemeError, match=message):
        quantize_(model, scheme, **options)
    assert type(model[0]) is nn.Linear


def test_a_bare_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(StructureError, match="itself a linear layer"):
        quantize_(nn.Linear(3, 4))


def test_a_weight_whose_dtype_is_asked_for_stays_in_float_and_is_named() -> None:
    module = Casting()
    x = torch.randn(8, 32)
    result = quantize_(copy.deepcopy(module), "w8a8", x)
    assert result.replaced == ("outer",)
    assert list(result.left) == ["inner.weight"]
    assert "dtype" in result.left["inner.weight"]
    assert relative(result.module, module, x) < 0.05
