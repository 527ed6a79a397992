"""The on-disk layouts, by the name of `--format`.

A new layout is one file, with the attributes and functions of `base.Layout`, and one line in `LAYOUTS`. Nothing else
in the code decides by a layout's name.
"""

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

# Which smoothing vectors stay with their layers: those that no producer can take, all, or none.
MigrationPolicy = Literal["unfolded", "always", "never"]


def supported_migration(
    migration_scale: MigrationPolicy, format: str, scheme: Scheme | None
) -> MigrationPolicy:
    """The policy for smoothing vectors that a layout can carry out: "never" where it has no place for them.

    scheme: None where layers stay in float. Raises SchemeError for "always" where there is no place, and for a value
    that is none of the three.
    """
    if migration_scale not in ("unfolded", "always", "never"):
        raise SchemeError(f"migration_scale must be unfolded, always or never; got {migration_scale!r}")
    supporting = [name for name, layout in LAYOUTS.items() if _has_place(layout, scheme)]
    if migration_scale == "always" and format not in supporting:
        raise SchemeError(
            f"migration_scale 'always' needs a format that holds it, {' or '.join(supporting)}; got {format!r}"
        )
    return migration_scale if format in supporting else "never"


def _has_place(layout: Layout, scheme: Scheme | None) -> bool:
    return layout.HOLDS_FLOAT_MIGRATION_SCALE if scheme is None else layout.HOLDS_MIGRATION_SCALE


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises SchemeError, naming the known ones."""
    if name not in LAYOUTS:
        raise SchemeError(f"format must be one of {', '.join(LAYOUTS)}; got {name!r}")
    return LAYOUTS[name]


def layout_of(quantization_config: Mapping[str, Any]) -> tuple[str, Layout]:
    """Name and layout of a `quantization_config`, by its `quant_method`. Raises CheckpointError for an unknown one."""
    method = quantization_config.get("quant_method")
    for name, layout in LAYOUTS.items():
        if method == layout.QUANT_METHOD:
            return name, layout
    raise CheckpointError(
        f"quantization_config has quant_method {method!r}; the layouts of {', '.join(LAYOUTS)} can be read"
    )
