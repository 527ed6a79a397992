"""Formats and schemes: how numbers become codes, and which elements share a scale.

A `TensorFormat` describes one tensor; a `Scheme` is the format of a layer's weight and of its input. Every granularity
is a tile over the last two dimensions, so one rule gives the shape of the scales, and `rounding` needs one loop:

    granularity    tile              scales of a (1024, 512) weight
    tensor         the whole tensor  (1,)
    channel        (1, in)           (1024, 1)    one output needs one row of W
    token          (1, in)           (B, T, 1)    the same tile, named for activations (B, T, in)
    group, g=128   (1, g)            (1024, 4)
    block          (128, 128)        (8, 4)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import SchemeError

DType = Literal["int8", "uint8", "int4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
ScaleDType = Literal["float8_e4m3fn", "float8_e8m0fnu"]
Granularity = Literal["tensor", "channel", "token", "group", "block"]

_STORAGE = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int4": torch.int8,  # one code per byte in memory; `packing` puts eight into a word on disk
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float4_e2m1fn": torch.float8_e4m3fn,  # holds all sixteen values; `packing` puts two into a byte on disk
}
_INTEGER_RANGE = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7)}
# The symmetric scale is absmax / steps. int4 uses half a step more than its highest code: with the codes -8 ... 7 a
# Gaussian group then has 11% less squared error than with 7.
_STEPS = {
    "int8": 127.0, "uint8": 127.0, "int4": 7.5, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float4_e2m1fn": 6.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """How one tensor becomes codes.

    dtype: of a code. granularity: which elements share a scale. group_size: elements along `in` per scale, for
    granularity "group". block_size: (out, in) of a tile, for granularity "block". symmetric: without a zero point.
    dynamic: scales are computed from each input at run time (activations only). scale_dtype: what scales are stored in,
    where the format defines it. "float8_e8m0fnu": powers of two. "float8_e4m3fn": e4m3, beside one float32 divisor per
    tensor (see `scales`); of an activation that is not dynamic, the divisor alone is fixed by calibration.

    >>> TensorFormat("int8", "channel").scale_shape((1024, 512))
    (1024, 1)
    >>> TensorFormat("int4", "group", group_size=128).scale_shape((1024, 512))
    (1024, 4)
    """

    dtype: DType = "int8"
    granularity: Granularity = "channel"
    group_size: int | None = None
    block_size: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: ScaleDType | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _STORAGE:
            raise SchemeError(f"dtype must be one of {', '.join(_STORAGE)}; got {self.dtype!r}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                f"group_size goes with granularity 'group' and only with it; got granularity "
                f"{self.granularity!r} with group_size {self.group_size}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size must be at least 1; got {self.group_size}")
        if (self.granularity == "block") != (self.block_size is not None):
            raise SchemeError(
                f"block_size goes with granularity 'block' and only with it; got granularity "
                f"{self.granularity!r} with block_size {self.block_size}"
            )
        if self.dtype == "uint8" and self.symmetric:
            raise SchemeError("uint8 codes need a zero point: symmetric must be False")
        if not self.symmetric and self.is_float:
            raise SchemeError(f"{self.dtype} codes have no zero point: symmetric must be True")
        if self.scale_dtype is not None and not self.symmetric:
            raise SchemeError(f"scales in {self.scale_dtype} are symmetric: symmetric must be True")

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point numbers."""
        return self.dtype.startswith("float")

    @property
    def bits(self) -> int:
        """Bits of one code on disk."""
        return 4 if self.dtype in ("int4", "float4_e2m1fn") else 8

    @property
    def storage(self) -> torch.dtype:
        """The dtype that holds one code in memory."""
        return _STORAGE[self.dtype]

    @property
    def code_range(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        if self.is_float:
            return -self.steps, self.steps
        return _INTEGER_RANGE[self.dtype]

    @property
    def steps(self) -> float:
        """The divisor of the symmetric scale, absmax / steps."""
        return _STEPS[self.dtype]

    @property
    def largest_power(self) -> float:
        """The largest power of two that is a code."""
        return 2.0 ** math.floor(math.log2(self.code_range[1]))

    @property
    def has_global_scale(self) -> bool:
        """Whether stored scales are relative to one float32 divisor per tensor."""
        return self.scale_dtype == "float8_e4m3fn"

    def tile(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns, over the last two dimensions of `shape`, that share one scale.

        Raises SchemeError where a group does not divide `in`.
        """
        rows, columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
        if self.granularity == "tensor":
            return rows, columns
        if self.block_size is not None:
            return self.block_size
        if self.group_size is None:
            return 1, columns
        if columns % self.group_size:
            raise SchemeError(
                f"in_features {columns} of a {tuple(shape)} weight is not divisible by group_size "
                f"{self.group_size}: choose a group size that divides it, or granularity 'channel'"
            )
        return 1, self.group_size

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales (and zero points) of a tensor of this shape; the table at the top."""
        if self.granularity == "tensor":
            return (1,)
        rows, columns = self.tile(shape)
        across = math.ceil(shape[-1] / columns) if columns else 1
        if self.granularity == "block":
            return (*shape[:-2], math.ceil(shape[-2] / rows), across)
        return (*shape[:-1], across)


@dataclass(frozen=True, slots=True)
class Scheme:
    """The formats of a linear layer's weight and of its input; `activation=None` leaves the input in float."""

    name: str
    weight: TensorFormat
    activation: TensorFormat | None = None

    @property
    def is_static(self) -> bool:
        """Whether the input's scale is fixed by calibration."""
        return self.activation is not None and not self.activation.dynamic

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration must run: to fix an input's scale, or to find the weights that share a global scale."""
        return self.is_static or self.weight.has_global_scale

    @property
    def is_asymmetric(self) -> bool:
        """Whether the input's codes need not reach as far below zero as above."""
        return self.activation is not None and not self.activation.symmetric


_W8 = TensorFormat("int8", "channel")
_DYNAMIC_INT8 = TensorFormat("int8", "token", dynamic=True)
_FP8: DType = "float8_e4m3fn"
_NVFP4 = TensorFormat("float4_e2m1fn", "group", group_size=16, scale_dtype="float8_e4m3fn")
_MXFP4 = TensorFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu")
_MXFP8 = replace(_MXFP4, dtype=_FP8)


def _int4(group_size: int, symmetric: bool = True) -> TensorFormat:
    return TensorFormat("int4", "group", group_size=group_size, symmetric=symmetric)


# Presets are values: no code branches on their names.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a8", _W8, _DYNAMIC_INT8),
        Scheme("w8a8-asym", _W8, TensorFormat("int8", "token", symmetric=False, dynamic=True)),
        Scheme("w8a8-static", _W8, TensorFormat("int8", "tensor")),
        Scheme("w8a8-static-asym", _W8, TensorFormat("int8", "tensor", symmetric=False)),
        Scheme("w8a16", _W8),
        Scheme("w4a16", _int4(128)),
        Scheme("w4a16-g64", _int4(64)),
        Scheme("w4a16-g32", _int4(32)),
        Scheme("w4a16-channel", TensorFormat("int4", "channel")),
        Scheme("w4a16-asym", _int4(128, symmetric=False)),
        Scheme("w4a8", _int4(128), _DYNAMIC_INT8),
        Scheme("fp8", TensorFormat(_FP8, "channel"), TensorFormat(_FP8, "token", dynamic=True)),
        Scheme("fp8-static", TensorFormat(_FP8, "tensor"), TensorFormat(_FP8, "tensor")),
        Scheme(
            "fp8-block",
            TensorFormat(_FP8, "block", block_size=(128, 128)),
            TensorFormat(_FP8, "group", group_size=128, dynamic=True),
        ),
        Scheme("nvfp4", _NVFP4, _NVFP4),
        Scheme("nvfp4a16", _NVFP4),
        Scheme("mxfp4", _MXFP4, replace(_MXFP4, dynamic=True)),
        Scheme("mxfp4a16", _MXFP4),
        Scheme("mxfp8", _MXFP8, replace(_MXFP8, dynamic=True)),
    )
}


def require_fit(scheme: Scheme, shape: Sequence[int]) -> None:
    """Raise SchemeError unless groups of the weight (..., out, in) and of its input divide `in`."""
    scheme.weight.scale_shape(shape)
    size = None if scheme.activation is None else scheme.activation.group_size
    if size is not None and shape[-1] % size:
        raise SchemeError(
            f"in_features {shape[-1]} is not divisible by {size}, the group_size of its input in scheme {scheme.name}: "
            "choose a scheme whose inputs have one scale per token"
        )


def get_scheme(scheme: str | Scheme) -> Scheme:
    """The preset of that name; a Scheme is returned as it is. Raises SchemeError, naming the known ones."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise SchemeError(f"scheme must be one of {', '.join(sorted(SCHEMES))}; got {scheme!r}")
    return SCHEMES[scheme]
