"""The layer as pure functions of plain tensors.

`quantized_linear` is the general integer form, with explicit scales and zero points on every side:

    acc = Σ_k (xq - x_zp) (wq - w_zp)       int32
    y   = acc · w_scale · x_scale + bias    float32
    out = y, or clamp(round(y / out_scale) + out_zp)

It needs none of PyTorch's quantized tensor types, and computes the same as `torch.ops.quantized.linear`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .errors import QLinearError

_CODES = (torch.int8, torch.uint8)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b in float: x (*, in), weight (out, in), bias (out,) → (*, out)."""
    y: Tensor = F.linear(x, weight, bias)
    return y


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """Weight codes (out, in) int8 that are already packed; made by `prepack`."""

    codes: Tensor


def prepack(weight: Tensor) -> PackedWeight:
    """Pack weight codes (out, in) int8 once, for any number of `quantized_linear` calls.

    The codes must not change afterwards through other tensors that share their memory.
    """
    _require(weight.dtype == torch.int8, f"w_codes must be int8; got {weight.dtype}")
    weight = weight.detach()
    ops.prepack(weight)
    return PackedWeight(weight)


def quantized_linear(
    x_codes: Tensor,
    w_codes: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    x_scale: float | Tensor,
    x_zero_point: int | Tensor = 0,
    w_scale: float | Tensor,
    w_zero_point: int | Tensor = 0,
    out_scale: float | Literal["input"] | None = None,
    out_zero_point: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The integer linear layer.

    x_codes: (*, in) uint8 or int8. w_codes: (out, in) int8, or the result of `prepack`; plain codes are packed again on
    every call. bias: (out,) float, added in float32.
    x_scale, x_zero_point: numbers or one-element tensors. w_scale, w_zero_point: the same, or per channel, (out,) or
    (out, 1).
    out_scale: None for float output in out_dtype (float32 if None). A number: codes in x's dtype with that scale and
    out_zero_point (0 if None). "input": codes with the scale and zero point of the input.

    Returns (*, out). Raises QLinearError, naming the argument, if dtypes, shapes or zero points do not match.
    """
    codes = w_codes.codes if isinstance(w_codes, PackedWeight) else w_codes.detach()
    _check(x_codes, codes, bias, out_scale, out_zero_point, out_dtype)
    x_zero = _zero_point(x_zero_point, x_codes, "x_zero_point")
    arguments = (
        x_codes,
        _scale(x_scale, x_codes, "x_scale", 1),
        x_zero,
        codes,
        _scale(w_scale, x_codes, "w_scale", codes.shape[0]),
        _zero_point(w_zero_point, codes, "w_zero_point", codes.shape[0]),
        bias,
    )
    if out_scale is None:
        return ops.codes_linear(*arguments, out_dtype or torch.float32)
    if out_scale == "input":
        zero = torch.zeros(1, dtype=x_codes.dtype, device=x_codes.device) if x_zero is None else x_zero
        return ops.requantized_linear(*arguments, arguments[1], zero)
    zero = torch.tensor(
        [_in_range(out_zero_point or 0, x_codes.dtype, "out_zero_point")], dtype=x_codes.dtype
    )
    scale = _scale(out_scale, x_codes, "out_scale", 1)
    return ops.requantized_linear(*arguments, scale, zero.to(x_codes.device))


def _check(
    x_codes: Tensor,
    w_codes: Tensor,
    bias: Tensor | None,
    out_scale: float | str | None,
    out_zero_point: int | None,
    out_dtype: torch.dtype | None,
) -> None:
    _require(x_codes.dtype in _CODES, f"x_codes must be int8 or uint8; got {x_codes.dtype}")
    _require(w_codes.dtype == torch.int8, f"w_codes must be int8; got {w_codes.dtype}")
    _require(w_codes.dim() == 2, f"w_codes must be (out, in); got shape {tuple(w_codes.shape)}")
    _require(
        x_codes.dim() > 0 and x_codes.shape[-1] == w_codes.shape[1],
        f"x_codes' last dimension must be in, {w_codes.shape[1]}; got shape {tuple(x_codes.shape)}",
    )
    _require(
        bias is None or bias.shape == (w_codes.shape[0],),
        f"bias must be ({w_codes.shape[0]},); got shape {None if bias is None else tuple(bias.shape)}",
    )
    if out_scale is None:
        _require(out_zero_point is None, "out_zero_point goes with out_scale; give both or neither")
        _require(
            out_dtype is None or out_dtype.is_floating_point,
            f"out_dtype must be a float dtype unless out_scale is given; got {out_dtype}",
        )
        return
    _require(
        out_scale != "input" or out_zero_point is None,
        "out_scale='input' takes the input's zero point; leave out_zero_point out",
    )
    _require(
        out_dtype is None or out_dtype == x_codes.dtype,
        f"requantized output has the input codes' dtype, {x_codes.dtype}; got out_dtype {out_dtype}",
    )


def _scale(scale: float | Tensor, like: Tensor, name: str, channels: int) -> Tensor:
    """The scale as float32 on `like`'s device: one element, or one per channel."""
    tensor = torch.as_tensor(scale, dtype=torch.float32, device=like.device).reshape(-1)
    _require(
        tensor.numel() in (1, channels), f"{name} must have 1{_or(channels)} elements; got {tensor.numel()}"
    )
    return tensor


def _zero_point(zero: int | Tensor, like: Tensor, name: str, channels: int = 1) -> Tensor | None:
    """The zero point in the dtype of `like`; None for the number 0, which needs no correction."""
    if isinstance(zero, int):
        if zero == 0:
            return None
        return torch.tensor([_in_range(zero, like.dtype, name)], dtype=like.dtype, device=like.device)
    _require(zero.numel() in (1, channels), f"{name} must have 1{_or(channels)} elements; got {zero.numel()}")
    return zero.reshape(-1).to(like.device, like.dtype)


def _or(channels: int) -> str:
    return "" if channels == 1 else f" or {channels}"


def _in_range(zero_point: int, dtype: torch.dtype, name: str) -> int:
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    _require(low <= zero_point <= high, f"{name} must lie in [{low}, {high}] for {dtype}; got {zero_point}")
    return zero_point


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise QLinearError(message)
