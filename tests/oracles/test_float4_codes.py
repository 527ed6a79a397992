"""NVFP4, MXFP4 and MXFP8: scales, codes and files, against those of the compressed-tensors package, to the bit.

Tiles of zeros are apart: ours store scale 1 there, theirs the least scale or another; both decode to zeros.
"""

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.quant_scheme import MXFP4, MXFP8, NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear.checkpoint.layouts.base import QuantizedLinear
from qlinear.checkpoint.layouts.compressed_tensors import pack, unpack
from qlinear.formats.packing import pack_e2m1, unpack_e2m1
from qlinear.formats.rounding import fake_quantize_input, input_qparams, quantize_tensor
from qlinear.formats.scheme import SCHEMES

THEIRS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8}
COMPRESSORS = {
    "nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor, "mxfp8": MXFP8QuantizationCompressor
}  # fmt: skip
every_scheme = pytest.mark.parametrize("name", THEIRS)


@st.composite
def numbers(draw: st.DrawFn) -> Tensor:
    """(out, in), `in` a multiple of 32, with outliers, sizes far apart, and tiles of zeros."""
    rows, columns = draw(st.integers(1, 40)), 32 * draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.floats(-6, 6))
    x *= 10.0 ** (draw(st.floats(0, 4)) * torch.rand(rows, 1, generator=generator))
    x[:, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from([1.0, 100.0]))
    if draw(st.booleans()):
        x[0, :32] = 0
    return x


def their_scales(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Scales as that package has them, and the global one."""
    tiles = x.unflatten(-1, (-1, args.group_size))
    shared = generate_gparam(x.amin(), x.amax()) if args.strategy == "tensor_group" else None
    return calculate_qparams(tiles.amin(-1), tiles.amax(-1), args, global_scale=shared)[0], shared


def is_ordinary(x: Tensor, args: QuantizationArgs, shared: Tensor | None) -> Tensor:
    """Where a tile's scale does not underflow: half of e4m3's least number, 2^-9, and float32's least exponents."""
    absmax = x.unflatten(-1, (-1, args.group_size)).abs().amax(-1)
    return absmax > 2.0**-115 if shared is None else absmax / 6 * shared > 2.0**-10


@every_scheme
@settings(max_examples=25, deadline=None)
@given(x=numbers())
def test_weights_have_their_scales_codes_and_files(name: str, x: Tensor) -> None:
    args = THEIRS[name]["weights"]
    scale, shared = their_scales(x, args)
    ours = quantize_tensor(x, SCHEMES[name].weight)
    scale = torch.where(is_ordinary(x, args, shared), scale, 1.0)
    effective = scale if shared is None else scale / shared
    assert torch.equal(ours.scale, effective)
    theirs = quantize(x, scale, None, args, global_scale=shared)
    assert torch.equal(ours.codes.float(), theirs)

    state = {"weight": x, "weight_scale": scale} | ({} if shared is None else {"weight_global_scale": shared})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    expected = COMPRESSORS[name].compress(state, scheme)
    ours_packed = pack("m", QuantizedLinear(SCHEMES[name if name == "mxfp8" else f"{name}a16"], ours))
    for leaf in ("weight_packed", "weight", "weight_scale", "weight_global_scale"):
        assert (leaf in expected) == (f"m.{leaf}" in ours_packed)
        if leaf in expected:
            assert expected[leaf].dtype == ours_packed[f"m.{leaf}"].dtype
            assert torch.equal(*(bits(t, leaf) for t in (expected[leaf], ours_packed[f"m.{leaf}"])))


def bits(tensor: Tensor, leaf: str) -> Tensor:
    """What must be equal: two zeros, of either sign, are."""
    if leaf == "weight_packed":
        return unpack_e2m1(tensor).float()
    return tensor.float()


@every_scheme
@settings(max_examples=25, deadline=None)
@given(x=numbers())
def test_inputs_are_rounded_as_theirs(name: str, x: Tensor) -> None:
    args, fmt = THEIRS[name]["input_activations"], SCHEMES[name].activation
    assert fmt is not None
    scale, shared = their_scales(x, args)
    scale = torch.where(is_ordinary(x, args, shared), scale, 1.0)
    theirs = fake_quantize(x, scale, None, args, global_scale=shared)
    fixed = (None, None) if fmt.dynamic else input_qparams(x.amin(), x.amax(), fmt)
    assert torch.equal(fake_quantize_input(x, fmt, *fixed), theirs)


@every_scheme
def test_what_is_packed_comes_back(name: str) -> None:
    x = torch.randn(20, 96) * torch.logspace(-3, 3, 20).unsqueeze(1)
    scheme = SCHEMES[name]
    one = None if scheme.activation is None or scheme.activation.dynamic else torch.full((1,), 7.0)
    linear = QuantizedLinear(scheme, quantize_tensor(x, scheme.weight), input_scale=one)
    found = unpack("m", pack("m", linear), scheme)
    assert torch.equal(found.weight.codes.view(torch.uint8), linear.weight.codes.view(torch.uint8))
    assert torch.equal(found.weight.scale, linear.weight.scale)
    assert (found.input_scale is None) == (one is None)


def test_every_nibble_is_the_value_that_it_stands_for() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    values = unpack_e2m1(packed)
    assert torch.equal(pack_e2m1(values), packed)
    expected = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(values[:16:2].float(), expected)
    assert torch.equal(values[16:32:2].float(), -expected) or torch.equal(
        values[0::2][8:16].float(), -expected
    )


@every_scheme
def test_zeros_stay_zeros_and_nothing_is_nan(name: str) -> None:
    fmt = SCHEMES[name].weight
    x = torch.randn(4, 64)
    x[0], x[1] = 0, 1e-30
    for tensor in (x, torch.zeros(4, 64)):
        ours = quantize_tensor(tensor, fmt)
        assert bool(ours.dequantize().isfinite().all())
        assert bool((ours.dequantize()[0] == 0).all())
