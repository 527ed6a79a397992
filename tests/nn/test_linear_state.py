"""The buffers of `QLinear`: loading, moving, copying and first values, as in `torch.nn.Linear`."""

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch

from qlinear.formats.scheme import Scheme
from qlinear.nn import QLinear

from .layers import make_layer, named


@named
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_round_trip_is_bit_exact(scheme: Scheme, bias: bool) -> None:
    _, layer = make_layer(scheme, bias, torch.rand(256) + 0.5)
    other = QLinear(256, 24, bias, scheme=scheme)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not any(other.load_state_dict(torch.load(file, weights_only=True)))
    x = torch.randn(3, 256)
    assert torch.equal(other(x), layer(x))
    assert {name: t.dtype for name, t in other.state_dict().items()} == {
        name: t.dtype for name, t in layer.state_dict().items()
    }


@named
@pytest.mark.parametrize("assign", [True, False])
def test_it_is_created_on_meta_and_loaded_afterwards(scheme: Scheme, assign: bool) -> None:
    _, source = make_layer(scheme, migration_scale=torch.rand(256) + 0.5)
    layer = QLinear(256, 24, device="meta", scheme=scheme)
    assert all(buffer.is_meta for buffer in layer.buffers())
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), source(x))


def test_loading_is_strict() -> None:
    _, layer = make_layer()
    state = layer.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match="weight_scale"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="surprise"):
        layer.load_state_dict({**layer.state_dict(), "surprise": torch.ones(1)})


def test_a_float_weight_is_not_taken_for_codes() -> None:
    linear, layer = make_layer()
    with pytest.raises(RuntimeError, match=r"weight must hold torch.int8 codes; got torch.float32"):
        layer.load_state_dict({**layer.state_dict(), "weight": linear.weight.detach()})


def pickle_copy(module: QLinear) -> QLinear:
    copied: QLinear = pickle.loads(pickle.dumps(module))
    return copied


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle_copy])
@named
def test_a_copy_is_independent(copier: Callable[[QLinear], QLinear], scheme: Scheme) -> None:
    if copier is pickle_copy and scheme.weight.is_float:
        pytest.skip("torch's tensors of float8 cannot be pickled outside torch.save")
    _, layer = make_layer(scheme)
    x = torch.randn(3, 256)
    before = layer(x)
    other = copier(layer)
    assert torch.equal(other(x), before)
    other.weight.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(other(x), before)


@named
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "cpu"])
def test_moving_changes_neither_codes_nor_scales(scheme: Scheme, move: str) -> None:
    _, layer = make_layer(scheme, migration_scale=torch.rand(256) + 0.5)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "bias"}
    getattr(layer, move)()
    for name, buffer in before.items():
        assert torch.equal(getattr(layer, name), buffer)
        assert getattr(layer, name).dtype == buffer.dtype
    expected = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    assert layer.dtype == layer.bias.dtype == expected.get(move, torch.float32)


def test_it_knows_its_dtype_without_a_bias() -> None:
    _, layer = make_layer(bias=False)
    assert layer.to(torch.bfloat16).dtype == torch.bfloat16
    assert layer.to("meta").device.type == "meta"
    assert layer.dtype == torch.bfloat16


def test_nothing_packed_is_saved() -> None:
    _, layer = make_layer()
    before = {name: buffer.shape for name, buffer in layer.named_buffers()}
    layer(torch.randn(3, 256))
    assert {name: buffer.shape for name, buffer in layer.named_buffers()} == before
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


@named
def test_fresh_parameters_are_distributed_as_linears_are(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layer = QLinear(256, 512, scheme=scheme)
    bound = 1 / math.sqrt(256)
    for values in (layer.dequantize().flatten(), layer.bias):
        assert values.abs().max() <= bound * 1.07
        quantiles = torch.quantile(values[:100000].float(), torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quantiles, bound * torch.tensor([-0.5, 0, 0.5]), atol=bound / 7, rtol=0)


def test_it_has_no_parameters_and_stays_in_its_mode() -> None:
    linear, layer = make_layer()
    assert not list(layer.parameters())
    assert layer.training
    assert not QLinear.from_float(linear.eval(), "w8a8").training
