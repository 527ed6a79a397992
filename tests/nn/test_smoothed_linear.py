"""`SmoothedLinear`: a float layer that divides its input."""

import pytest
import torch
from torch import Tensor, nn

from qlinear.nn import SmoothedLinear

S = torch.tensor([0.25, 8.0, 1.0, 2.0, 0.5])  # powers of two, so that nothing is rounded


def smoothed(linear: nn.Linear) -> SmoothedLinear:
    with torch.no_grad():
        linear.weight.mul_(S)
    return SmoothedLinear.from_float(linear, S)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_layer_did_before_smoothing(bias: bool, dtype: torch.dtype) -> None:
    linear, x = nn.Linear(5, 3, bias, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
    expected: Tensor = linear(x)
    y = smoothed(linear)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)


def test_its_vector_stays_float32_in_any_dtype() -> None:
    vector = S * 1.001
    layer = SmoothedLinear.from_float(nn.Linear(5, 3), vector).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.migration_scale, vector)
    assert SmoothedLinear(5, 3, device="meta").to_empty(device="cpu").migration_scale.dtype == torch.float32


def test_its_state_is_that_of_a_linear_and_the_vector() -> None:
    layer, twin = smoothed(nn.Linear(5, 3)), SmoothedLinear(5, 3)
    assert layer.state_dict().keys() == {"weight", "bias", "migration_scale"}
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(layer(x), twin(x))
