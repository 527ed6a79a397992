"""Random weight-only layers with the error bound of their 4-bit product, and processors with other native products."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from qlinear import ops
from qlinear.ops import reference, torch_int4, weight_only

CPU = torch.device("cpu")
needs_int4 = pytest.mark.skipif(
    not torch_int4.works(CPU), reason="torch has no 4-bit product on this processor"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
HALF, SINGLE = 2.0**-8, 2.0**-24  # half a unit in the last place, of bfloat16 and of float32


class WeightOnlyLayer:
    """Random codes in groups, scales that are bfloat16 numbers, and an input, all determined by the seed."""

    def __init__(self, rows: int, width: int, out: int, tile: int, asymmetric: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, width, generator=generator).bfloat16()
        self.weight = torch.randint(-8, 8, (out, width), generator=generator, dtype=torch.int8)
        scale = 10.0 ** (2 * torch.rand(out, width // tile, generator=generator) - 2)
        self.scale = scale.bfloat16().float()
        zeros = torch.randint(-8, 8, self.scale.shape, generator=generator, dtype=torch.int8)
        self.zero_point = zeros if asymmetric else None

    @property
    def matrix(self) -> Tensor:
        return reference.dequantized(self.weight, self.scale, self.zero_point)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return ops.weight_only_linear(x, self.weight, self.scale, self.zero_point, None, None, 4)


@st.composite
def layers(draw: st.DrawFn) -> WeightOnlyLayer:
    tile = draw(st.sampled_from([32, 64, 96, 128, 256, 512]))
    width, out = tile * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 5))
    return WeightOnlyLayer(
        draw(st.integers(1, 64)), width, out, tile, draw(st.booleans()), draw(st.integers(0, 999))
    )


def limit(layer: WeightOnlyLayer) -> Tensor:
    """Error bound: rounding the result to bfloat16, summing in float32, rounding -zero · scale to bfloat16."""
    x, width = layer.x.double().abs(), layer.x.shape[1]
    exact = layer.x.double() @ layer.matrix.double().T
    summed = 2 * width * SINGLE * (x @ (layer.weight.abs() + 16).double().mul(spread(layer, layer.scale)).T)
    if layer.zero_point is None:
        return HALF * (exact.abs() + summed) + summed
    shifts = spread(layer, layer.zero_point.double() * layer.scale).abs()
    return HALF * (exact.abs() + summed + x @ shifts.T) * (1 + 2 * HALF) + summed


def spread(layer: WeightOnlyLayer, per_tile: Tensor) -> Tensor:
    return per_tile.double().repeat_interleave(layer.weight.shape[1] // per_tile.shape[1], 1)


@contextmanager
def native_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Context manager: the layer computes as on a processor with native products in these half dtypes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (weight_only, torch_int4):
            patch.setattr(module, "has_native_products", lambda dtype, device: dtype in dtypes)
        yield


# The half dtypes that a processor multiplies natively; products in the others are computed in float32.
natively = pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
