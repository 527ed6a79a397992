"""Fused norms: the codes and scales are those of the float norm, computed in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qlinear import ops
from qlinear.nn import QLayerNorm, QLinear, QRMSNorm, silu_mul_quantize

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.sampled_from([(8,), (3, 8), (2, 0, 8), (2, 3, 40), (300, 1024)])


def random_input(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 10 ** (seed % 5 - 2)
    if x.dim() > 1 and len(x):
        x[0] = 0
    return x.to(dtype)


def assert_codes_represent(pair: tuple[Tensor, Tensor], y: Tensor) -> None:
    """Assert that codes are within half a step of float64 `y`, plus float32 rounding, and scales follow absmax."""
    codes, scale = pair
    assert codes.dtype == torch.int8
    assert scale.shape == (*y.shape[:-1], 1)
    absmax = y.abs().amax(-1, keepdim=True)
    alive = absmax > 0
    torch.testing.assert_close(scale.double()[alive], (absmax / 127)[alive], rtol=1e-5, atol=0)
    error = (codes.double() * scale.double() - y).abs()
    assert bool((error <= scale.double() * 0.5001 + 1e-5 * absmax).all())


@settings(max_examples=25)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99), offset=st.sampled_from([0.0, 1.0]))
def test_an_rms_norm_in_codes_is_the_float_norm_rounded(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: float
) -> None:
    x, migration = random_input(shape, dtype, seed), torch.rand(shape[-1]) + 0.5 if seed % 2 else None
    norm = nn.RMSNorm(shape[-1], eps=1e-5)
    nn.init.normal_(norm.weight)
    y = F.rms_norm(x.double(), norm.normalized_shape, norm.weight.double() + offset, 1e-5).detach()
    fused = QRMSNorm.from_float(norm, migration, offset=offset)
    assert_codes_represent(fused(x), y if migration is None else y / migration.double())


@settings(max_examples=25)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99), bias=st.booleans())
def test_a_layer_norm_in_codes_is_the_float_norm_rounded(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, bias: bool
) -> None:
    x, migration = random_input(shape, dtype, seed), torch.rand(shape[-1]) + 0.5 if seed % 2 else None
    norm = nn.LayerNorm(shape[-1], bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    y = norm.double()(x.double()).detach()
    fused = QLayerNorm.from_float(norm.float(), migration)
    assert_codes_represent(fused(x), y if migration is None else y / migration.double())


@settings(max_examples=25)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99))
def test_a_gated_product_in_codes_is_the_float_one_rounded(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    gate, up = random_input(shape, dtype, seed).clamp(-50, 50), random_input(shape, dtype, seed + 1)
    migration = torch.rand(shape[-1]) + 0.5 if seed % 2 else None
    y = F.silu(gate.double()) * up.double()
    assert_codes_represent(
        silu_mul_quantize(gate, up, migration), y if migration is None else y / migration.double()
    )


@settings(max_examples=25)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99))
def test_quantizing_tokens_does_not_change_the_input(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    x = random_input(shape, dtype, seed)
    before = x.clone()
    assert_codes_represent(ops.quantize_tokens(x, None), x.double())
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("norm", "fuse"), [(nn.RMSNorm(64), QRMSNorm.from_float), (nn.LayerNorm(64), QLayerNorm.from_float)]
)
def test_a_layer_takes_the_pair_of_its_norm(norm: nn.Module, fuse: Callable[..., nn.Module]) -> None:
    migration = torch.rand(64) + 0.5
    layer = QLinear.from_float(nn.Linear(64, 24), "w8a8", migration_scale=migration)
    x = torch.randn(5, 7, 64)
    fused, separate = layer(fuse(norm, migration)(x)), layer(norm(x).detach())
    assert fused.shape == (5, 7, 24)
    assert (fused - separate).norm() < 0.01 * separate.norm()


def test_strides_do_not_matter() -> None:
    x = torch.randn(4, 16, 6).transpose(1, 2)
    for norm in (QRMSNorm(16), QLayerNorm(16)):
        for ours, theirs in zip(norm(x), norm(x.contiguous()), strict=True):
            assert torch.equal(ours, theirs)


def test_an_eps_of_none_is_torchs() -> None:
    assert QRMSNorm.from_float(nn.RMSNorm(8)).eps == torch.finfo(torch.float32).eps


def test_norms_and_their_layer_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(QRMSNorm(64), QLinear.from_float(nn.Linear(64, 8), "w8a8"))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("quantize_tokens", (torch.randn(3, 16), None)),
        ("rms_norm_quantize", (torch.randn(3, 16), torch.rand(16), 1e-6, torch.rand(16) + 0.5)),
        ("layer_norm_quantize", (torch.randn(3, 16), torch.rand(16), torch.rand(16), 1e-5, None)),
        ("silu_mul_quantize", (torch.randn(3, 16), torch.randn(3, 16), None)),
    ],
)
def test_operators_pass_opcheck(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.qlinear, name).default, arguments)
