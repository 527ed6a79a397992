"""LMDeploy's `quantization_config` said in compressed-tensors' words, so that vLLM's own schemes can serve it.

LMDeploy's `smooth_quant` layout has the same numbers as w8a8 or fp8 in compressed-tensors; only the name of one tensor
(`scale` for `weight_scale`) and the shape of the config differ. Nothing here imports vLLM.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.layouts import compressed_tensors
from ..errors import CheckpointError
from ..formats.scheme import get_scheme

# The suffix of a tensor in the file, and what the engine calls that tensor.
RENAMED = {".scale": ".weight_scale"}

_SCHEMES = {"int8": "w8a8", "float8_e4m3fn": "fp8"}


def as_compressed_tensors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The compressed-tensors config of a `smooth_quant` one. Raises CheckpointError for an unknown quant_dtype."""
    dtype = config.get("quant_dtype") or "int8"
    if dtype not in _SCHEMES:
        raise CheckpointError(
            f"quantization_config has quant_dtype {dtype!r}: {' and '.join(_SCHEMES)} can be served"
        )
    ignore = ignore_patterns(config.get("modules_to_not_convert") or ())
    return compressed_tensors.quantization_config(get_scheme(_SCHEMES[dtype]), ignore)


def ignore_patterns(modules_to_not_convert: Sequence[str]) -> list[str]:
    """`ignore` for modules that are named in full, or by a part of their name such as `lm_head`.

    Each name is given twice: as it is, which the engine renames as it renames modules, and as a pattern for parts.
    """
    patterns = (rf"re:(.*\.)?{re.escape(name)}(\..*)?$" for name in modules_to_not_convert)
    return [*modules_to_not_convert, *patterns]
