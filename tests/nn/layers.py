"""Quantized layers of every scheme, with 256 inputs and 24 outputs."""

import pytest
import torch
from torch import Tensor, nn

from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat
from qlinear.nn import QLinear

W4 = TensorFormat("int4", "group", group_size=8)
INT8_TOKEN = TensorFormat("int8", "token", dynamic=True)
GENERIC = (
    Scheme("w4a16", W4),
    Scheme("w4a16-asym", TensorFormat("int4", "group", group_size=8, symmetric=False)),
    Scheme("w4a8", W4, INT8_TOKEN),
    Scheme("fp8", TensorFormat("float8_e4m3fn"), TensorFormat("float8_e4m3fn", "token", dynamic=True)),
    Scheme("block", TensorFormat("float8_e4m3fn", "block", block_size=(8, 8))),
    Scheme("w8a8-uint8", TensorFormat(), TensorFormat("uint8", "tensor", symmetric=False)),
)
# The layers here have 256 inputs. Schemes whose groups do not divide 256 are in GENERIC with smaller groups.
FITTING = [
    s for s in SCHEMES.values() if s.weight.group_size in (None, 16, 32, 256) and s.weight.block_size is None
]
ALL_SCHEMES = [*FITTING, *GENERIC]
named = pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=lambda scheme: scheme.name)


class InputRange:
    """Statistics of inputs between -3 and 3."""

    min, max = torch.full((256,), -3.0), torch.full((256,), 3.0)


def make_layer(
    scheme: str | Scheme = "w8a8", bias: bool = True, migration_scale: Tensor | None = None
) -> tuple[nn.Linear, QLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(256, 24, bias)
    return linear, QLinear.from_float(linear, scheme, InputRange, migration_scale)
