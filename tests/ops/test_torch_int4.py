"""Torch's 4-bit products: exact up to rounding, tested before use, and used where they pay off."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import qlinear
from qlinear.ops import torch_int4

from ..support.models import save_model
from .weight_only_layers import CPU, WeightOnlyLayer, layers, limit, native_products, needs_cuda, needs_int4


@needs_int4
@settings(max_examples=60)
@given(layer=layers())
def test_four_bit_products_are_exact_up_to_the_rounding_of_bfloat16(layer: WeightOnlyLayer) -> None:
    with native_products():  # where the kernel takes the most rows
        assert torch_int4.fits(layer.x, layer.weight, layer.scale)
        error = (layer().double() - layer.x.double() @ layer.matrix.double().T).abs()
    assert bool((error <= limit(layer)).all())


@needs_int4
@pytest.mark.parametrize(("native", "most"), [((), 64), ((torch.bfloat16,), 40)])
def test_more_rows_than_pay_off_are_dequantized(native: tuple[torch.dtype, ...], most: int) -> None:
    with native_products(*native):
        for rows in (most, most + 1):
            layer = WeightOnlyLayer(rows, 64, 16, 32, False, 0)
            assert torch_int4.fits(layer.x, layer.weight, layer.scale) == (rows == most)


def test_a_wrong_product_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch_int4._product
    torch_int4.works.cache_clear()
    monkeypatch.setattr(torch_int4, "_product", lambda *args: product(*args) + 1)
    assert not torch_int4.works(CPU)
    monkeypatch.undo()
    torch_int4.works.cache_clear()


@given(out=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_cuda_packs_two_fields_per_byte_the_first_in_the_upper_half(out: int, width: int, seed: int) -> None:
    fields = torch.randint(0, 16, (out, 2 * width), generator=torch.Generator().manual_seed(seed))
    assert torch_int4.bytes_of(fields.to(torch.int8)).tolist() == [
        [16 * first + second for first, second in zip(row[::2], row[1::2], strict=True)]
        for row in fields.tolist()
    ]


@settings(max_examples=30)
@given(layer=layers())
def test_cuda_takes_the_shapes_that_fit(layer: WeightOnlyLayer) -> None:
    """Checked on fake tensors: torch checks their shapes and dtypes as it does on a GPU."""
    size = torch_int4.group_size(layer.weight, layer.scale)
    arguments = (
        layer.x,
        torch_int4.bytes_of(layer.weight + 8),
        torch_int4.scale_and_shift(layer.weight, layer.scale),
    )
    assert arguments[2].shape == (layer.weight.shape[1] // size, layer.weight.shape[0], 2)
    with FakeTensorMode():
        x, fields, pairs = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in arguments)
        packed = torch_int4.pack_on_cuda(fields)
        y = torch_int4._product(x, packed, size, pairs)
    assert (packed.dtype, packed.numel() * 8) == (torch.int32, layer.weight.numel())
    assert (y.shape, y.dtype) == ((len(layer.x), len(layer.weight)), torch.bfloat16)


@needs_cuda
@settings(max_examples=30)
@given(layer=layers())
def test_four_bit_products_on_cuda_are_exact_up_to_the_rounding_of_bfloat16(layer: WeightOnlyLayer) -> None:
    assert torch_int4.works(torch.device("cuda"))
    exact, bound = layer.x.double() @ layer.matrix.double().T, limit(layer)
    layer.x, layer.weight, layer.scale = layer.x.cuda(), layer.weight.cuda(), layer.scale.cuda()
    layer.zero_point = None if layer.zero_point is None else layer.zero_point.cuda()
    assert torch_int4.fits(layer.x, layer.weight, layer.scale)
    assert bool(((layer().cpu().double() - exact).abs() <= bound).all())


@needs_int4
def test_a_loaded_model_multiplies_its_four_bit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    source = save_model(tmp_path / "source", **sizes)
    ids = torch.arange(3, 67).reshape(8, 8)
    qlinear.quantize(source, tmp_path / "out", "w4a16-g32", calibration=ids)
    model = qlinear.load(tmp_path / "out", dtype="bfloat16").eval()
    assert torch_int4.works(CPU)  # the one test of the kernel runs now
    kernel_calls, linear = [], torch_int4.linear
    monkeypatch.setattr(torch_int4, "linear", lambda *args: (kernel_calls.append(1), linear(*args))[1])
    with torch.no_grad():
        with_kernel = model(ids[:2]).logits
        assert len(kernel_calls) == 14
        assert model.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 12)
        monkeypatch.setattr(torch_int4, "works", lambda device: False)
        without_kernel = model(ids[:2]).logits
    error = float((with_kernel - without_kernel).float().norm() / without_kernel.float().norm())
    assert 0 < error < 0.03
