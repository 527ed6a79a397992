"""The operators of the quantized linear layer: one schema each, with a kernel per device that the dispatcher chooses.

Every device has the reference. CPUs have oneDNN's int8 product, and CPUs and CUDA devices have torch's 4-bit product.
torch.compile, torch.export and torch.jit.trace see the schemas and fake kernels below, so a whole layer is one node in
their graphs. `reference` documents the arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu_int8, fused_quantize, reference, weight_only
from .reference import quantize_static

_LIBRARY = torch.library.Library("qlinear", "DEF")  # type: ignore[no-untyped-call]


def _like_input(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _like_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, *_: Any) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[0])


def _of_dtype(codes: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return _like_codes(codes, scale, zero_point, weight).to(rest[-1])


def _codes_and_scale(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _register(schema: str, cpu_kernel: Callable[..., Any], any_kernel: Callable[..., Any], fake: Any) -> Any:
    """Define an operator with its kernels and the shape of its result; returns the callable."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu_kernel, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, any_kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"qlinear::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qlinear, name).default


dynamic_linear: Callable[..., Tensor] = _register(
    "dynamic_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? migration_scale, Tensor? bias, "
    "bool symmetric) -> Tensor",
    cpu_int8.dynamic_linear,
    reference.dynamic_linear,
    _like_input,
)
static_linear: Callable[..., Tensor] = _register(
    "static_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? migration_scale, Tensor? bias, "
    "Tensor input_scale, Tensor? input_zero_point) -> Tensor",
    cpu_int8.static_linear,
    reference.static_linear,
    _like_input,
)
_CODES = (
    "(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point, Tensor? bias, "
)
codes_linear: Callable[..., Tensor] = _register(
    f"codes_linear{_CODES}ScalarType dtype) -> Tensor",
    cpu_int8.codes_linear,
    reference.codes_linear,
    _of_dtype,
)
requantized_linear: Callable[..., Tensor] = _register(
    f"requantized_linear{_CODES}Tensor out_scale, Tensor out_zero_point) -> Tensor",
    cpu_int8.requantized_linear,
    reference.requantized_linear,
    _like_codes,
)
weight_only_linear: Callable[..., Tensor] = _register(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, "
    "Tensor? migration_scale, Tensor? bias, int bits) -> Tensor",
    weight_only.weight_only_linear,
    weight_only.weight_only_linear,
    _like_input,
)
_Pair = tuple[Tensor, Tensor]
quantize_tokens: Callable[..., _Pair] = _register(
    "quantize_tokens(Tensor x, Tensor? migration_scale) -> (Tensor, Tensor)",
    fused_quantize.quantize_tokens,
    fused_quantize.quantize_tokens,
    _codes_and_scale,
)
rms_norm_quantize: Callable[..., _Pair] = _register(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, Tensor? migration_scale) -> (Tensor, Tensor)",
    fused_quantize.rms_norm_quantize,
    fused_quantize.rms_norm_quantize,
    _codes_and_scale,
)
layer_norm_quantize: Callable[..., _Pair] = _register(
    "layer_norm_quantize(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? migration_scale) "
    "-> (Tensor, Tensor)",
    fused_quantize.layer_norm_quantize,
    fused_quantize.layer_norm_quantize,
    _codes_and_scale,
)
silu_mul_quantize: Callable[..., _Pair] = _register(
    "silu_mul_quantize(Tensor gate, Tensor up, Tensor? migration_scale) -> (Tensor, Tensor)",
    fused_quantize.silu_mul_quantize,
    fused_quantize.silu_mul_quantize,
    _codes_and_scale,
)


def prepack(weight: Tensor) -> None:
    """Pack weight codes (out, in) int8 now; the packed layout is cached while the tensor exists unchanged."""
    if weight.device.type == "cpu":
        cpu_int8.prepack(weight)


__all__ = [
    "codes_linear",
    "dynamic_linear",
    "layer_norm_quantize",
    "prepack",
    "quantize_static",
    "quantize_tokens",
    "requantized_linear",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "static_linear",
    "weight_only_linear",
]
