"""qlinear's own layout: compressed-tensors plus `migration_scale` [K] float32 where the vector stays with its layer.

A checkpoint that was only smoothed has float weights and no scheme. Where a vector stays with its layer, the weight is
W · diag(s) in the source's dtype, and `quantization_config` names the linear under `migration_scale`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...formats.scheme import Scheme
from ..reader import Checkpoint
from . import compressed_tensors
from .base import QuantizedLinear, Schemes

QUANT_METHOD = "qlinear"
SCALE_NAME = compressed_tensors.SCALE_NAME
HOLDS_MIGRATION_SCALE = True
HOLDS_FLOAT_MIGRATION_SCALE = True
HOLDS_TRANSPOSED = True


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """See `Layout`."""
    return compressed_tensors.quantization_config(schemes, ignore) | {"quant_method": "qlinear"}


def float_config(holders: Sequence[str]) -> dict[str, Any]:
    """config.json's `quantization_config` where nothing is quantized.

    holders: the linears, by their names in the file, that have a `migration_scale` beside their weight.
    """
    return quantization_config({}, ()) | {"migration_scale": list(holders)}


def float_holders(config: Mapping[str, Any]) -> frozenset[str]:
    """The float linears that a `quantization_config` says have a `migration_scale`, by their names in the file."""
    return frozenset(config.get("migration_scale", ()))


def schemes_from_config(config: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """See `Layout`."""
    return compressed_tensors.schemes_from_config(config, linears)


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """See `Layout`."""
    return compressed_tensors.weight_shape(name, checkpoint)


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """See `Layout`."""
    tensors = compressed_tensors.pack(name, dataclasses.replace(linear, migration_scale=None))
    if linear.migration_scale is not None:
        tensors[f"{name}.migration_scale"] = linear.migration_scale.to(torch.float32)
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """See `Layout`."""
    linear = compressed_tensors.unpack(name, tensors, scheme)
    return dataclasses.replace(linear, migration_scale=tensors.get(f"{name}.migration_scale"))
