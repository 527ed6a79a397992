"""The codes of every preset against those that the compressed-tensors package chooses for the same numbers.

FP8: scales and codes are theirs to the bit (a row of zeros apart, where ours has scale 1 and theirs the least one).
Integers: the scale is a choice of ours (numerics.py), so theirs is asked for the codes that follow from our scale.
"""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.checkpoint.layouts.compressed_tensors import quantization_config
from qlinear.formats.rounding import choose_qparams, quantize_tensor
from qlinear.formats.rounding import quantize as our_quantize
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat

FP8 = ["fp8", "fp8-static", "fp8-block"]
INTEGER = sorted(name for name, scheme in SCHEMES.items() if not scheme.weight.is_float)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """(out, in), in a multiple of 128, with outliers, and with rows or whole 128 × 128 blocks of zeros."""
    rows, columns = draw(st.integers(1, 150)), 128 * draw(st.integers(1, 2))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    x *= 10.0 ** draw(st.floats(-4, 4))
    x[:, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from([1.0, 100.0]))
    for row in draw(st.sets(st.integers(0, rows - 1), max_size=3)):
        x[row] = 0
    if draw(st.booleans()):
        x[:128, :128] = 0
    return x


def their_args(fmt: TensorFormat) -> QuantizationArgs:
    """Their description of a format, made from the very config that we write."""
    group = quantization_config(Scheme("x", replace(fmt, dynamic=fmt.granularity == "token")), [])
    return QuantizationArgs(**group["config_groups"]["group_0"]["weights"])


def extremes(x: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each tile, found tile by tile, in the shape that their scales have."""
    if fmt.granularity == "tensor":
        return x.min().reshape(1), x.max().reshape(1)
    rows, columns = fmt.tile(x.shape)
    tiles = [list(row.split(columns, 1)) for row in x.split(rows, 0)]
    low = torch.tensor([[float(tile.min()) for tile in row] for row in tiles])
    high = torch.tensor([[float(tile.max()) for tile in row] for row in tiles])
    return low, high


@pytest.mark.parametrize("name", FP8)
@settings(max_examples=20)
@given(x=weights())
def test_fp8_weights_have_their_scales_and_codes(name: str, x: Tensor) -> None:
    fmt = SCHEMES[name].weight
    scale, zero_point = calculate_qparams(*extremes(x, fmt), their_args(fmt))
    theirs = quantize(x, scale, zero_point, their_args(fmt), dtype=torch.float8_e4m3fn)
    ours = quantize_tensor(x, fmt)
    assert torch.equal(ours.codes.view(torch.uint8) & 0x7F, theirs.view(torch.uint8) & 0x7F)
    assert torch.equal(ours.codes.float(), theirs.float())
    empty = scale == torch.finfo(torch.float32).eps
    assert torch.equal(ours.scale[~empty], scale[~empty])
    assert bool((ours.scale[empty] == 1).all())


@pytest.mark.parametrize("name", FP8)
@settings(max_examples=20)
@given(x=weights())
def test_fp8_activations_have_their_scales_and_codes(name: str, x: Tensor) -> None:
    fmt = SCHEMES[name].activation
    assert fmt is not None
    scale, zero_point = calculate_qparams(*extremes(x, fmt), their_args(fmt))
    theirs = quantize(x, scale, zero_point, their_args(fmt), dtype=torch.float8_e4m3fn)
    ours, _ = choose_qparams(x, fmt)
    assert torch.equal(our_quantize(x, ours, None, fmt).float(), theirs.float())
    empty = scale == torch.finfo(torch.float32).eps
    assert torch.equal(ours[~empty], scale[~empty])


@pytest.mark.parametrize("name", INTEGER)
@settings(max_examples=20)
@given(x=weights())
def test_integer_codes_are_what_theirs_are_with_our_scales_and_decode_alike(name: str, x: Tensor) -> None:
    fmt = SCHEMES[name].weight
    ours = quantize_tensor(x, fmt)
    zero = torch.zeros_like(ours.scale) if ours.zero_point is None else ours.zero_point
    args = their_args(fmt)
    theirs = quantize(x, ours.scale, zero, args, dtype=torch.int8)
    off = (theirs.int() - ours.codes.int()).abs()
    # With a zero point they round after adding it, which moves exact halves; nothing else may differ.
    assert int(off.max()) <= (0 if fmt.symmetric else 1)
    assert float(off.float().mean()) <= 1e-3
    assert torch.equal(dequantize(ours.codes, ours.scale, zero, args), ours.dequantize())
