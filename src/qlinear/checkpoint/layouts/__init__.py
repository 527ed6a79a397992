"""The layouts that can be written and read, by the name of `--format` and by config.json's `quant_method`."""

from collections.abc import Mapping
from typing import Any, Literal

from ...errors import CheckpointError, SchemeError
from ...formats.scheme import Scheme
from . import awq, compressed_tensors, lmdeploy
from . import qlinear as qlinear_layout
from .base import Layout

LAYOUTS: dict[str, Layout] = {
    "compressed-tensors": compressed_tensors,
    "lmdeploy": lmdeploy,
    "awq": awq,
    "qlinear": qlinear_layout,
}
_QUANT_METHODS = {"smooth_quant": "lmdeploy"}
# The layouts that have a place for a smoothing vector which stays with its layer, quantized or in float.
_HOLD_VECTORS = ("qlinear", "lmdeploy")
_HOLD_FLOAT_VECTORS = ("qlinear",)

# The layouts that have a place for linears which the model stores as (in, out): transformers' Conv1D.
HOLD_TRANSPOSED = ("qlinear", "lmdeploy")

# Which smoothing vectors stay with their layers: those that nothing can take, all, or none.
MigrationPolicy = Literal["unfolded", "always", "never"]


def kept(migration_scale: MigrationPolicy, format: str, scheme: Scheme | None) -> MigrationPolicy:
    """Which vectors stay with their layers in this layout, which may have no place for them; scheme: None for float.

    Raises SchemeError if all should stay and there is none, or if `migration_scale` is none of its three values.
    """
    if migration_scale not in ("unfolded", "always", "never"):
        raise SchemeError(f"migration_scale must be unfolded, always or never; got {migration_scale!r}")
    places = _HOLD_FLOAT_VECTORS if scheme is None else _HOLD_VECTORS
    if migration_scale == "always" and format not in places:
        raise SchemeError(
            f"migration_scale 'always' needs a format that holds it, {' or '.join(places)}; got {format!r}"
        )
    return migration_scale if format in places else "never"


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises SchemeError, naming the known ones."""
    if name not in LAYOUTS:
        raise SchemeError(f"format must be one of {', '.join(LAYOUTS)}; got {name!r}")
    return LAYOUTS[name]


def layout_of(quantization_config: Mapping[str, Any]) -> tuple[str, Layout]:
    """Name and layout that a `quantization_config` speaks of. Raises CheckpointError for one we cannot read."""
    method = quantization_config.get("quant_method")
    name = _QUANT_METHODS.get(str(method), str(method))
    if name not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise CheckpointError(
            f"quantization_config has quant_method {method!r}; the layouts of {known} can be read"
        )
    return name, LAYOUTS[name]
