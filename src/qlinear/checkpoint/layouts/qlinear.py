"""qlinear's own layout: that of compressed-tensors, and `migration_scale` [K] float32 where one is kept.

A checkpoint that was only smoothed has float weights, W · diag(s) in the source's dtype where a vector is kept, and no
scheme: its `quantization_config` names the linears that have a `migration_scale` beside their weight.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...formats.scheme import Scheme
from . import compressed_tensors
from .base import QuantizedLinear, Schemes


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """See `Layout`."""
    return compressed_tensors.quantization_config(schemes, ignore) | {"quant_method": "qlinear"}


def float_config(holders: Sequence[str]) -> dict[str, Any]:
    """config.json's `quantization_config` where nothing is quantized, and these linears of the file hold a vector."""
    return quantization_config({}, ()) | {"migration_scale": list(holders)}


def float_holders(config: Mapping[str, Any]) -> frozenset[str]:
    """The float linears that hold a vector, as a `quantization_config` names them."""
    return frozenset(config.get("migration_scale", ()))


def schemes_from_config(config: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """See `Layout`."""
    return compressed_tensors.schemes_from_config(config, linears)


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
