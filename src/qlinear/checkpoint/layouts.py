"""The layouts that can be written and read, by the name of `--format` and by config.json's `quant_method`."""

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, SchemeError
from . import awq, compressed_tensors, lmdeploy, qlinear_layout
from .layout import Layout

LAYOUTS: dict[str, Layout] = {
    "compressed-tensors": compressed_tensors,
    "lmdeploy": lmdeploy,
    "awq": awq,
    "qlinear": qlinear_layout,
}
_QUANT_METHODS = {"smooth_quant": "lmdeploy"}


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
