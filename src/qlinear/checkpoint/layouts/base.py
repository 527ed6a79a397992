"""What a layout is: the names, dtypes and shapes of a quantized linear's tensors in a file, and its config entry.

A layout never changes a code. To convert from one layout to another, unpack with the first and pack with the second.
Every layout is a module with the attributes and functions of `Layout`. `layouts/__init__.py` lists them by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SchemeError
from ...formats.rounding import QuantizedTensor
from ...formats.scheme import SCHEMES, Scheme, TensorFormat
from ..reader import Checkpoint

# One scheme for all linears, or a scheme per linear by name.
Schemes = Scheme | Mapping[str, Scheme]
_CODE_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A quantized linear as a file holds it, independent of the layout. Its bias stays as the source has it.

    scheme: the formats of weight and input. weight: codes (out, in), scale, zero point.
    scale_dtype: the dtype in which the weight's scales are stored, and to which they were rounded (`scale_dtype`).
    input_scale, input_zero_point: (1,) float32, for static activations only; `input_scale` is the global scale, a
    divisor, where the activation's format has one.
    migration_scale: (in,) float32, the divisor of the input, where it is not folded into a producer.
    """

    scheme: Scheme
    weight: QuantizedTensor
    scale_dtype: torch.dtype = torch.float32
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    migration_scale: Tensor | None = None


class Layout(Protocol):
    """One on-disk layout; a module. Names are the file's.

    QUANT_METHOD: its name in config.json. SCALE_NAME: the last part of the name of a linear's scales.
    HOLDS_MIGRATION_SCALE: whether a quantized linear may have a smoothing vector beside it;
    HOLDS_FLOAT_MIGRATION_SCALE: whether a float one may. HOLDS_TRANSPOSED: whether linears that the model stores as
    (in, out), transformers' Conv1D, may be quantized.
    """

    QUANT_METHOD: str
    SCALE_NAME: str
    HOLDS_MIGRATION_SCALE: bool
    HOLDS_FLOAT_MIGRATION_SCALE: bool
    HOLDS_TRANSPOSED: bool

    def quantization_config(self, schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
        """config.json's `quantization_config` for linears with these schemes.

        ignore: the names of all modules that stay in float. Raises SchemeError for a scheme that cannot be held.
        """

    def schemes_from_config(
        self, config: Mapping[str, Any], linears: Mapping[str, nn.Module]
    ) -> dict[str, Scheme]:
        """The scheme of every linear that a `quantization_config` says is quantized.

        linears: the candidates by name. Raises CheckpointError for a config that cannot be read.
        """

    def weight_shape(self, name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """(out, in) of the quantized linear `name`; None where the file lacks its codes."""

    def pack(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of the linear `name`, by their full names. Raises SchemeError where the layout cannot hold it."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """The linear `name`, from tensors by their full names. Raises CheckpointError if one is missing."""


def scale_dtype(scheme: Scheme, stored: torch.dtype) -> torch.dtype:
    """The dtype in which a weight's scales are stored.

    Engines hold the scales of 4-bit integers in the weight's own dtype, so they are rounded to it; others are float32,
    unless the format itself defines how they are stored (`TensorFormat.scale_dtype`).
    stored: the dtype of the float weight in the source.
    """
    return stored if scheme.weight.bits == 4 and scheme.weight.scale_dtype is None else torch.float32


def packed_bytes(
    layout: Layout, scheme: Scheme, shape: Sequence[int], stored: torch.dtype, keeps_vector: bool = False
) -> int:
    """Bytes in the file of a quantized weight (out, in), or of a whole stack (experts, out, in).

    Computed by packing tensors on meta, so it is exact and costs no memory. stored: the dtype of the float weight.
    keeps_vector: whether a migration scale is stored with it. Raises SchemeError for a scheme that cannot be held.
    """
    fmt, activation, meta = scheme.weight, scheme.activation, torch.device("meta")
    matrix = tuple(shape[-2:])
    scale, one = torch.empty(fmt.scale_shape(matrix), device=meta), torch.empty(1, device=meta)
    codes = torch.empty(matrix, dtype=fmt.storage, device=meta)
    linear = QuantizedLinear(
        scheme,
        QuantizedTensor(
            codes, scale, None if fmt.symmetric else scale, fmt, one if fmt.has_global_scale else None
        ),
        scale_dtype(scheme, stored),
        input_scale=one if scheme.is_static else None,
        input_zero_point=one if scheme.is_static and activation and not activation.symmetric else None,
        migration_scale=torch.empty(matrix[-1], device=meta) if keeps_vector else None,
    )
    return prod(shape[:-2]) * sum(tensor.nbytes for tensor in layout.pack("", linear).values())


def as_scheme(weight: TensorFormat, activation: TensorFormat | None) -> Scheme:
    """The preset with these formats; a scheme named after its bits where there is none."""
    for preset in SCHEMES.values():
        if (preset.weight, preset.activation) == (weight, activation):
            return preset
    bits = 16 if activation is None else activation.bits
    return Scheme(f"w{weight.bits}a{bits}", weight, activation)


def only_scheme(schemes: Schemes, layout: str) -> Scheme:
    """The scheme that all linears share. Raises SchemeError if there are several: the layout holds only one."""
    distinct = {schemes} if isinstance(schemes, Scheme) else set(schemes.values())
    if len(distinct) != 1:
        names = ", ".join(sorted(scheme.name for scheme in distinct)) or "none"
        raise SchemeError(
            f"the {layout} layout holds exactly one scheme, got {names}: use --format compressed-tensors"
        )
    return distinct.pop()


def is_excluded(name: str, modules_to_not_convert: Sequence[str]) -> bool:
    """Whether the list names a linear or a module that contains it, in full or in part, such as `lm_head`."""
    return any(f".{part}." in f".{name}." for part in modules_to_not_convert)


def without_patterns(ignore: Sequence[str]) -> list[str]:
    """The names of `ignore` for a layout that knows no `re:` patterns: it matches by parts of names anyway."""
    return [name for name in ignore if not name.startswith("re:")]


def require(name: str, leaf: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor `name.leaf`. Raises CheckpointError where there is none."""
    full = f"{name}.{leaf}"
    if full not in tensors:
        raise CheckpointError(f"{full} is missing, though config.json says that {name} is quantized")
    return tensors[full]


def plain_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The shape of codes that are stored unpacked, as `name.weight`; None where there are none."""
    info = checkpoint.tensors.get(f"{name}.weight")
    return info.shape if info is not None and info.dtype_name in _CODE_DTYPES else None
