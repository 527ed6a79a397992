"""The integer kernels: equal to float32 of an int32 accumulator, on every processor."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlinear import ops
from qlinear.ops import onednn_product, reference

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# Rows on both sides of a block of rows, widths on both sides of a slice of exact float32 sums.
ROWS = st.sampled_from([0, 1, 2, 17, 511, 512, 513])
WIDTHS = st.sampled_from([1, 3, 64, 511, 1024, 1025, 2100])
OUTS = st.sampled_from([1, 5, 64, 130])


def codes(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.int8) -> Tensor:
    """Random codes, half of them the dtype's extremes, where sums saturate first."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    anything = torch.randint(low, high + 1, shape, generator=generator)
    extreme = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, anything, extreme).to(dtype)


class IntegerLayer:
    """A random layer and input; the same seed gives the same layer."""

    def __init__(self, rows: int, width: int, out: int, dtype: torch.dtype, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, width, generator=self.generator).to(dtype)
        self.weight = codes((out, width), self.generator)
        self.weight_scale = torch.rand(out, 1, generator=self.generator) + 1e-3
        self.bias = torch.randn(out, generator=self.generator).to(dtype) if seed % 2 else None
        self.migration = torch.rand(width, generator=self.generator) + 0.5 if seed % 3 else None


layers = st.builds(IntegerLayer, ROWS, WIDTHS, OUTS, DTYPES, st.integers(0, 1000))


def int64_accumulator(x_codes: Tensor, zero_point: int, weight: Tensor) -> Tensor:
    return (x_codes.long() - zero_point) @ weight.long().t()


@given(
    dtype=st.sampled_from([torch.int8, torch.uint8]),
    rows=st.integers(1, 5),
    width=st.integers(1, 3000),
    seed=st.integers(0, 99),
)
def test_the_reference_product_is_the_integer_product(
    dtype: torch.dtype, rows: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = codes((rows, width), generator, dtype), codes((7, width), generator)
    x[0], weight[0] = torch.iinfo(dtype).max, -128
    assert torch.equal(reference.int_matmul(x, weight).long(), int64_accumulator(x, 0, weight))


def test_autocast_does_not_round_the_integer_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = codes((4, 900), generator), codes((5, 900), generator)
    with torch.autocast("cpu", torch.bfloat16):
        product = reference.int_matmul(x, weight)
    assert torch.equal(product.long(), int64_accumulator(x, 0, weight))


@settings(max_examples=60)
@given(layer=layers)
def test_the_dynamic_layer_is_the_reference_bit_for_bit(layer: IntegerLayer) -> None:
    arguments = (layer.x, layer.weight, layer.weight_scale, layer.migration, layer.bias, True)
    y = ops.dynamic_linear(*arguments)
    assert y.dtype == layer.x.dtype
    assert torch.equal(y, reference.dynamic_linear(*arguments))


@settings(max_examples=60)
@given(layer=layers, zero_point=st.sampled_from([None, -128, -3, 0, 127]), unsigned=st.booleans())
def test_the_static_layer_is_the_reference_bit_for_bit(
    layer: IntegerLayer, zero_point: int | None, unsigned: bool
) -> None:
    zero = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int8)
    if zero is not None and unsigned:
        zero = (zero.int() + 128).to(torch.uint8)
    # With this scale some inputs are outside the range and are clamped.
    scale = torch.tensor([0.011])
    arguments = (layer.x, layer.weight, layer.weight_scale, layer.migration, layer.bias, scale, zero)
    assert torch.equal(ops.static_linear(*arguments), reference.static_linear(*arguments))


@settings(max_examples=60)
@given(
    layer=layers,
    dtype=st.sampled_from([torch.int8, torch.uint8]),
    per_token=st.booleans(),
    zeros=st.booleans(),
)
def test_the_layer_on_codes_is_the_integer_formula_in_float32(
    layer: IntegerLayer, dtype: torch.dtype, per_token: bool, zeros: bool
) -> None:
    x = codes(tuple(layer.x.shape), layer.generator, dtype)
    scale = torch.rand(x.shape[0], 1, generator=layer.generator) if per_token else torch.tensor([0.3])
    zero_point = torch.tensor([3], dtype=dtype) if zeros else None
    y = ops.codes_linear(
        x, scale, zero_point, layer.weight, layer.weight_scale, None, layer.bias, torch.float32
    )
    acc = int64_accumulator(x, 3 if zeros else 0, layer.weight)
    expected = acc.float() * layer.weight_scale.t() * scale
    assert torch.equal(y, expected if layer.bias is None else expected + layer.bias.float())


@given(shape=st.sampled_from([(8,), (3, 8), (2, 0, 8), (2, 3, 4, 8)]), transposed=st.booleans())
def test_leading_dimensions_and_strides_do_not_matter(shape: tuple[int, ...], transposed: bool) -> None:
    weight, scale = torch.randint(-128, 128, (6, 8), dtype=torch.int8), torch.rand(6, 1)
    x = torch.randn(shape)
    x_strided = x.transpose(0, -1).contiguous().transpose(0, -1) if transposed else x
    y = ops.dynamic_linear(x_strided, weight, scale, None, None, True)
    flat = ops.dynamic_linear(x.reshape(-1, 8), weight, scale, None, None, True)
    assert torch.equal(y, flat.reshape(*shape[:-1], 6))


def test_a_per_tensor_weight_scale_is_one_for_every_channel() -> None:
    x, weight = torch.randn(3, 16), torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    one, many = torch.tensor([0.5]), torch.full((6, 1), 0.5)
    assert torch.equal(
        ops.dynamic_linear(x, weight, one, None, None, True),
        ops.dynamic_linear(x, weight, many, None, None, True),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", [ops.dynamic_linear, reference.dynamic_linear])
def test_a_token_that_is_not_finite_affects_no_other(kernel: object, bad: float) -> None:
    x, weight = torch.randn(3, 16), torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    clean = ops.dynamic_linear(x, weight, torch.ones(6, 1), None, None, True)
    x[1, 4] = bad
    y = kernel(x, weight, torch.ones(6, 1), None, None, True)  # type: ignore[operator]
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_a_packed_weight_is_packed_again_when_its_codes_change() -> None:
    x = torch.randn(3, 16)
    weight, scale = torch.randint(-128, 128, (6, 16), dtype=torch.int8), torch.ones(6, 1)
    for change in (lambda: None, lambda: weight.neg_(), lambda: weight[2].zero_(), lambda: weight.t_().t_()):
        change()
        y = ops.dynamic_linear(x, weight, scale, None, None, True)
        assert torch.equal(y, reference.dynamic_linear(x, weight, scale, None, None, True))


def test_a_packed_weight_is_dropped_with_its_codes() -> None:
    weight = torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    before = len(onednn_product._packed)
    onednn_product.packed_once(weight)
    assert len(onednn_product._packed) == before + 1
    del weight
    assert len(onednn_product._packed) == before


def test_the_default_device_does_not_affect_the_kernels() -> None:
    x, weight = torch.randn(3, 16), torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    arguments = (x, weight, torch.rand(6, 1), None, None, True)
    expected, exact = ops.dynamic_linear(*arguments), onednn_product.is_exact()
    onednn_product.is_exact.cache_clear()
    with torch.device("meta"):
        assert torch.equal(ops.dynamic_linear(*arguments), expected)
    assert onednn_product.is_exact() == exact


EXACT = """
import torch
from qlinear import ops
from qlinear.ops import onednn_product
g = torch.Generator().manual_seed(0)
for rows, width, out in ((1, 2600, 65), (40, 4096, 64), (300, 515, 33)):
    x = torch.where(torch.rand(rows, width, generator=g) < 0.5, -128, 127).to(torch.int8)
    w = torch.where(torch.rand(out, width, generator=g) < 0.5, -128, 127).to(torch.int8)
    x[0], w[0] = 127, -128
    scale = torch.rand(out, 1, generator=g)
    y = ops.codes_linear(x, torch.ones(1), None, w, scale, None, None, torch.float32)
    assert torch.equal(y, (x.long() @ w.long().t()).float() * scale.t()), (rows, width, out)
print(onednn_product.is_exact())
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "ALL"])
def test_sums_are_exact_on_every_kind_of_x86(isa: str) -> None:
    """Without VNNI oneDNN's sums saturate: `is_exact` must detect it, so that the reference computes the layer."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("True", "False")


def test_without_onednn_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_product, "is_exact", lambda: False)
    monkeypatch.setattr(onednn_product, "pack", lambda weight: pytest.fail("packed although it is inexact"))
    x, weight = torch.randn(3, 16), torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    arguments = (x, weight, torch.rand(6, 1), None, None, True)
    assert torch.equal(ops.dynamic_linear(*arguments), reference.dynamic_linear(*arguments))


def samples(kernel: str) -> tuple[object, ...]:
    x, weight = torch.randn(3, 16), torch.randint(-128, 128, (6, 16), dtype=torch.int8)
    scale, bias, zero = torch.rand(6, 1), torch.randn(6), torch.tensor([3], dtype=torch.int8)
    on_codes = (weight[:3].clone(), torch.rand(3, 1), None, weight, scale, None, bias)
    return {
        "dynamic_linear": (x, weight, scale, torch.rand(16) + 0.5, bias, True),
        "static_linear": (x, weight, scale, None, bias, torch.tensor([0.1]), zero),
        "codes_linear": (*on_codes, torch.bfloat16),
        "requantized_linear": (*on_codes, torch.tensor([0.5]), zero),
        "weight_only_linear": (x, weight, scale, None, torch.rand(16) + 0.5, bias, 8),
    }[kernel]


KERNELS = ["dynamic_linear", "static_linear", "codes_linear", "requantized_linear", "weight_only_linear"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_operators_pass_opcheck(kernel: str) -> None:
    torch.library.opcheck(getattr(torch.ops.qlinear, kernel).default, samples(kernel))
