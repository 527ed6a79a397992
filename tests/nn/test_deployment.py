"""QLinear under compile, export, trace and autograd: one node of the graph, with the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from qlinear.nn import QLinear
from qlinear.ops import onednn_product


class InputRange64:
    min, max = torch.full((64,), -3.0), torch.full((64,), 3.0)


SCHEMES = ["w8a8", "w8a8-static", "w8a8-asym", "w8a16"]


def network(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    first = QLinear.from_float(nn.Linear(64, 64), scheme, InputRange64)
    return nn.Sequential(
        first, nn.ReLU(), QLinear.from_float(nn.Linear(64, 8, bias=False), scheme, InputRange64)
    )


def inputs() -> list[Tensor]:
    return [torch.randn(rows, 64) for rows in (2, 5, 9)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_compiles_without_graph_breaks_with_a_dynamic_batch(scheme: str) -> None:
    torch._dynamo.reset()
    model = network(scheme)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in inputs():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_compiled_model_packs_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn_product.is_exact():
        pytest.skip("no packed product on this processor")
    torch._dynamo.reset()
    calls, pack = [], onednn_product.pack
    monkeypatch.setattr(onednn_product, "pack", lambda weight: (calls.append(1), pack(weight))[1])
    compiled = torch.compile(network("w8a8"), fullgraph=True, dynamic=True, backend="aot_eager")
    for x in inputs():
        compiled(x)
    assert len(calls) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_exports_with_a_dynamic_batch(scheme: str) -> None:
    model = network(scheme)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(3, 64),), dynamic_shapes=({0: batch},))
    for x in inputs():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_bare_layer_exports_with_any_of_its_buffers(scheme: str, bias: bool) -> None:
    """torch.export identifies the buffers of the exported module itself by position."""
    for migration in (None, torch.rand(64) + 0.5):
        layer = QLinear.from_float(nn.Linear(64, 8, bias), scheme, InputRange64, migration)
        program = torch.export.export(layer, (torch.randn(3, 64),))
        x = torch.randn(3, 64)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_traces(scheme: str) -> None:
    model = network(scheme)
    traced = torch.jit.trace(model, torch.randn(3, 64))
    for x in inputs():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_straight_through(scheme: str) -> None:
    layer = QLinear.from_float(nn.Linear(64, 8), scheme, InputRange64, torch.rand(64) + 0.5)
    x = torch.randn(3, 64).clamp(-1, 1).requires_grad_()
    layer(x).square().sum().backward()
    y = layer(x.detach())
    torch.testing.assert_close(x.grad, 2 * y @ layer.dequantize(), rtol=1e-4, atol=1e-5)


def test_autocast_does_not_change_the_integer_layer() -> None:
    layer, x = network("w8a8"), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.clone()))
        y = layer(x)
    assert torch.equal(y, layer(x))


def test_inference_mode_gives_the_same_numbers() -> None:
    with torch.inference_mode():
        model, x = network("w8a8"), torch.randn(3, 64)
        y = model(x)
    assert torch.equal(y.clone(), network("w8a8")(x.clone()))
