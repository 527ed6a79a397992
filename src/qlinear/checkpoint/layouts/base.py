"""What a layout is: four functions from tensors to tensors and from settings to settings.

A layout says under which names, dtypes and shapes a quantized linear layer lies in a file, and how config.json
speaks of it. It never touches a code, so going from one layout to another is unpack with the first, pack with
the second. Each is a module of its own with the functions of `Layout`; `layouts` has them by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import SchemeError
from ...formats.rounding import QuantizedTensor
from ...formats.scheme import SCHEMES, Scheme, TensorFormat

# One scheme for every linear, or one for each by name.
Schemes = Scheme | Mapping[str, Scheme]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """What a file holds of a quantized linear layer, whatever the layout; its bias stays as the source has it.

    scheme: the formats of weight and input. weight: codes (out, in), scale, zero point.
    scale_dtype: what the weight's scales are stored in, and were rounded to: see the function of that name.
    input_scale, input_zero_point: (1,) float32, for static activations only.
    migration_scale: (in,) float32, what the input is divided by, where it is not folded.
    """

    scheme: Scheme
    weight: QuantizedTensor
    scale_dtype: torch.dtype = torch.float32
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    migration_scale: Tensor | None = None


class Layout(Protocol):
    """One on-disk layout. `linears` are modules by the names that the file gives them."""

    def quantization_config(self, schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
        """config.json's `quantization_config` for linears with these schemes, all others named in `ignore`.

        Raises SchemeError for a scheme that the layout cannot hold.
        """

    def schemes_from_config(
        self, config: Mapping[str, Any], linears: Mapping[str, nn.Module]
    ) -> dict[str, Scheme]:
        """The scheme of each linear that a `quantization_config` says is quantized. Raises CheckpointError."""

    def pack(self, name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors of the linear `name`, by their full names. Raises SchemeError for what it cannot hold."""

    def unpack(self, name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
        """The linear `name` from tensors by their full names. Raises CheckpointError if one is missing."""


def scale_dtype(scheme: Scheme, stored: torch.dtype) -> torch.dtype:
    """What the scales of a weight of a stored dtype are stored in: engines hold those of 4-bit weights as that."""
    return stored if scheme.weight.bits == 4 else torch.float32


def packed_bytes(
    layout: Layout, scheme: Scheme, shape: Sequence[int], stored: torch.dtype, keeps_vector: bool = False
) -> int:
    """What a weight (out, in), or all of a stack (experts, out, in), will take in a file; nothing is computed for it.

    stored: the dtype of the float weight. keeps_vector: with a migration scale. Raises
    SchemeError where the layout cannot hold the scheme.
    """
    fmt, activation, meta = scheme.weight, scheme.activation, torch.device("meta")
    matrix = tuple(shape[-2:])
    scale, one = torch.empty(fmt.scale_shape(matrix), device=meta), torch.empty(1, device=meta)
    codes = torch.empty(matrix, dtype=fmt.storage, device=meta)
    held = QuantizedLinear(
        scheme,
        QuantizedTensor(codes, scale, None if fmt.symmetric else scale, fmt),
        scale_dtype(scheme, stored),
        input_scale=one if scheme.is_static else None,
        input_zero_point=one if scheme.is_static and activation and not activation.symmetric else None,
        migration_scale=torch.empty(matrix[-1], device=meta) if keeps_vector else None,
    )
    return prod(shape[:-2]) * sum(tensor.nbytes for tensor in layout.pack("", held).values())


def as_scheme(weight: TensorFormat, activation: TensorFormat | None) -> Scheme:
    """The preset with these formats, or a scheme named after them."""
    for preset in SCHEMES.values():
        if (preset.weight, preset.activation) == (weight, activation):
            return preset
    bits = 16 if activation is None else activation.bits
    return Scheme(f"w{weight.bits}a{bits}", weight, activation)


def only_scheme(schemes: Schemes, layout: str) -> Scheme:
    """The one scheme of all linears. Raises SchemeError if there are several, for a layout that holds one."""
    distinct = {schemes} if isinstance(schemes, Scheme) else set(schemes.values())
    if len(distinct) != 1:
        names = ", ".join(sorted(scheme.name for scheme in distinct)) or "none"
        raise SchemeError(
            f"the {layout} layout holds exactly one scheme, got {names}: use --format compressed-tensors"
        )
    return distinct.pop()


def is_excluded(name: str, modules_to_not_convert: Sequence[str]) -> bool:
    """Whether a linear, or a module around it, is named there, in full or by parts such as `lm_head`."""
    return any(f".{part}." in f".{name}." for part in modules_to_not_convert)
