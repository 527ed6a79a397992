"""The compressed-tensors layout, which vLLM, SGLang and transformers load.

    format            weights                    tensors of a linear [N, K]
    int-quantized     int8, input int8           weight i8 [N,K]; weight_scale [N,1]; weight_zero_point i8
    pack-quantized    int4; int8, input float    weight_packed i32 [N,⌈K·bits/32⌉]; weight_scale; weight_shape [2];
                                                 weight_zero_point i32, packed along N
    float-quantized   fp8                        weight e4m3 [N,K]; weight_scale
    static inputs     any of them                + input_scale [1]; input_zero_point i8 [1] if asymmetric
    nvfp4-pack-quantized                         weight_packed u8 [N,K/2]; weight_scale e4m3 [N,K/16];
                                                 weight_global_scale, input_global_scale [1], both divisors
    mxfp4-pack-quantized                         weight_packed u8 [N,K/2]; weight_scale u8 [N,K/32], an exponent
    mxfp8-quantized                              weight e4m3 [N,K]; weight_scale u8 [N,K/32], an exponent

Scales have the shape `TensorFormat.scale_shape`. The layout has no place for a migration scale.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SchemeError
from ...formats.packing import pack_e2m1, pack_words, unpack_e2m1, unpack_words
from ...formats.rounding import QuantizedTensor
from ...formats.scheme import DType, Scheme, TensorFormat
from ..reader import Checkpoint
from .base import QuantizedLinear, Schemes, as_scheme, plain_shape, require
from .compressed_tensors_args import read_block, require_types

QUANT_METHOD = "compressed-tensors"
SCALE_NAME = "weight_scale"
HOLDS_MIGRATION_SCALE = False
HOLDS_FLOAT_MIGRATION_SCALE = False
HOLDS_TRANSPOSED = False

# The formats that define how their scales are stored.
_FORMATS: dict[tuple[str, str | None], str] = {
    ("float4_e2m1fn", "float8_e4m3fn"): "nvfp4-pack-quantized",
    ("float4_e2m1fn", "float8_e8m0fnu"): "mxfp4-pack-quantized",
    ("float8_e4m3fn", "float8_e8m0fnu"): "mxfp8-quantized",
}
_EXPONENT_BIAS = 127
_KNOWN_ARGS = {"num_bits", "type", "strategy", "symmetric", "dynamic", "group_size", "block_structure"}
# Arguments that do not change how codes are read.
_HARMLESS_ARGS = {"observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "is_mx"}


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """See `Layout`. A single scheme targets every Linear that is not ignored; several target modules by name."""
    groups = _targets(schemes)
    formats = list(dict.fromkeys(_format(scheme) for scheme in groups))
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(groups) > 1 else next(iter(formats), "dense"),
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "weights": _to_args(scheme.weight),
                "input_activations": None
                if scheme.activation is None
                else _to_args(scheme.activation, is_input=True),
                "format": _format(scheme),
            }
            for i, (scheme, targets) in enumerate(groups.items())
        },
    }


# A member of a list that is itself in a list, as experts are in layers: the list, the index, the linear in it.
_MEMBER = re.compile(r"(.+\.\d+\..+)\.(\d+)\.([^.]+)")


def _targets(schemes: Schemes) -> dict[Scheme, list[str]]:
    """The targets of every scheme: all Linears for a single scheme; else names, and patterns for lists of experts.

    transformers finds the experts' scheme by a pattern with their name. A pattern also replaces thousands of names.
    """
    if isinstance(schemes, Scheme) or len(set(schemes.values())) == 1:
        return {
            scheme: ["Linear"] for scheme in ([schemes] if isinstance(schemes, Scheme) else schemes.values())
        }
    members = {name: match.group(1, 3) for name in schemes if (match := _MEMBER.fullmatch(name))}
    in_list: dict[tuple[str, str], set[Scheme]] = {}
    for name, member in members.items():
        in_list.setdefault((member[0], member[1]), set()).add(schemes[name])
    groups: dict[Scheme, dict[str, None]] = {}
    for name, scheme in schemes.items():
        owner, leaf = members.get(name, ("", ""))
        is_alike = len(in_list.get((owner, leaf), ())) == 1
        target = f"re:{re.escape(owner)}\\.\\d+\\.{re.escape(leaf)}$" if is_alike else name
        groups.setdefault(scheme, {})[target] = None
    return {scheme: list(targets) for scheme, targets in groups.items()}


def schemes_from_config(config: Mapping[str, Any], linears: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """See `Layout`. In `targets`, a name has precedence over a pattern, and a pattern over a class."""
    groups = [
        (group["targets"], _from_group(group)) for group in dict(config.get("config_groups", {})).values()
    ]
    ignored = config.get("ignore") or []
    schemes = {}
    for name, module in linears.items():
        ranks = [(_rank(name, module, targets), scheme) for targets, scheme in groups]
        rank, scheme = min(ranks, key=lambda pair: pair[0], default=(_NO_MATCH, None))
        if scheme is not None and rank < _NO_MATCH and _rank(name, module, ignored) == _NO_MATCH:
            schemes[name] = scheme
    return schemes


def weight_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """See `Layout`. Packed codes have their shape in a tensor of its own."""
    if f"{name}.weight_packed" in checkpoint.tensors:
        if f"{name}.weight_shape" in checkpoint.tensors:
            return tuple(checkpoint.read(f"{name}.weight_shape").tolist())
        rows, pairs = checkpoint.tensors[f"{name}.weight_packed"].shape
        return rows, 2 * pairs
    return plain_shape(name, checkpoint)


def pack(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """See `Layout`; the table at the top."""
    if linear.migration_scale is not None:
        raise SchemeError(
            f"{name} keeps a migration scale, which compressed-tensors has no place for: --format qlinear"
        )
    weight, tensors = linear.weight, {}
    if weight.format.dtype == "float4_e2m1fn":
        tensors["weight_packed"] = pack_e2m1(weight.codes)
    elif _format(linear.scheme) == "pack-quantized":
        tensors["weight_packed"] = pack_words(weight.codes, weight.format.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
        if weight.zero_point is not None:
            zero = weight.zero_point.to(torch.int8)
            tensors["weight_zero_point"] = pack_words(zero.mT, weight.format.bits).mT.contiguous()
    else:
        tensors["weight"] = weight.codes
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = weight.zero_point.to(torch.int8)
    tensors["weight_scale"] = _stored_scale(linear)
    if weight.global_scale is not None:
        tensors["weight_global_scale"] = weight.global_scale
    if linear.input_scale is not None:
        tensors[_input_scale_name(linear.scheme)] = linear.input_scale
    if linear.input_zero_point is not None:
        tensors["input_zero_point"] = linear.input_zero_point.to(torch.int8)
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _stored_scale(linear: QuantizedLinear) -> Tensor:
    """A weight's scales as the file holds them."""
    scale, fmt = linear.weight.scale, linear.weight.format
    if fmt.scale_dtype == "float8_e8m0fnu":
        return (scale.log2().round() + _EXPONENT_BIAS).to(torch.uint8)
    if fmt.has_global_scale and linear.weight.global_scale is not None:
        return (scale * linear.weight.global_scale).to(torch.float8_e4m3fn)
    return scale.to(linear.scale_dtype)


def _effective_scale(stored: Tensor, fmt: TensorFormat, global_scale: Tensor | None) -> Tensor:
    """The inverse of `_stored_scale`, float32."""
    if fmt.scale_dtype == "float8_e8m0fnu":
        return torch.exp2(stored.float() - _EXPONENT_BIAS)
    return stored.float() if global_scale is None else stored.float() / global_scale


def _input_scale_name(scheme: Scheme) -> str:
    is_global = scheme.activation is not None and scheme.activation.has_global_scale
    return "input_global_scale" if is_global else "input_scale"


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """See `Layout`; the table at the top."""
    scale = require(name, "weight_scale", tensors)
    zero = None if scheme.weight.symmetric else require(name, "weight_zero_point", tensors)
    shared = None
    if scheme.weight.has_global_scale:
        shared = require(name, "weight_global_scale", tensors).float().reshape(1)
    # Other tools leave 4-bit codes unpacked, one per byte, where inputs are int8.
    if scheme.weight.dtype == "float4_e2m1fn":
        codes = unpack_e2m1(require(name, "weight_packed", tensors))
    elif _format(scheme) == "pack-quantized" and f"{name}.weight" not in tensors:
        rows, columns = require(name, "weight_shape", tensors).tolist()
        codes = unpack_words(require(name, "weight_packed", tensors), scheme.weight.bits, columns)
        zero = None if zero is None else unpack_words(zero.mT, scheme.weight.bits, rows).mT
    else:
        codes = require(name, "weight", tensors)
    expected = scheme.weight.scale_shape(codes.shape)
    weight = QuantizedTensor(
        codes,
        _effective_scale(scale, scheme.weight, shared).reshape(expected),
        None if zero is None else zero.float().reshape(expected),
        scheme.weight,
        shared,
    )
    is_static, activation = scheme.is_static, scheme.activation
    input_zero = is_static and activation is not None and not activation.symmetric
    return QuantizedLinear(
        scheme,
        weight,
        scale.dtype if scheme.weight.scale_dtype is None else torch.float32,
        require(name, _input_scale_name(scheme), tensors).float().reshape(1) if is_static else None,
        require(name, "input_zero_point", tensors).float().reshape(1) if input_zero else None,
    )


def _format(scheme: Scheme) -> str:
    """compressed-tensors' name for how a scheme's weights are stored."""
    if (special := _FORMATS.get((scheme.weight.dtype, scheme.weight.scale_dtype))) is not None:
        return special
    if scheme.weight.is_float:
        return "float-quantized"
    if scheme.weight.dtype == "uint8":
        raise SchemeError(
            f"scheme {scheme.name} has uint8 weights, which compressed-tensors cannot hold: use int8"
        )
    is_packed = scheme.activation is None or scheme.weight.bits == 4
    return "pack-quantized" if is_packed else "int-quantized"


def _to_args(fmt: TensorFormat, is_input: bool = False) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of a format."""
    args: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "float" if fmt.is_float else "int",
        "strategy": "tensor_group" if fmt.has_global_scale else fmt.granularity,
        "symmetric": fmt.symmetric,
        "dynamic": "local" if is_input and fmt.has_global_scale else fmt.dynamic,
    }
    if fmt.scale_dtype is not None:
        args["scale_dtype"] = "torch.float8_e4m3fn" if fmt.has_global_scale else "torch.uint8"
    if fmt.group_size is not None:
        args["group_size"] = fmt.group_size
    if fmt.block_size is not None:
        args["block_structure"] = list(fmt.block_size)
    if not fmt.symmetric:
        args["zp_dtype"] = "torch.int8"
    return args


def _from_group(group: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group. Raises CheckpointError for what we cannot read."""
    if group.get("weights") is None:
        raise CheckpointError(
            f"quantization_config quantizes no weights of {group['targets']}: cannot be read here"
        )
    inputs = group.get("input_activations")
    return as_scheme(_from_args(group["weights"]), None if inputs is None else _from_args(inputs))


def _from_args(args: Mapping[str, Any]) -> TensorFormat:
    """The format of compressed-tensors' QuantizationArgs, their defaults filled in as that package does."""
    require_types(args)
    given = {key for key, value in args.items() if value is not None}
    kinds: dict[tuple[str, int], DType] = {
        ("int", 8): "int8",
        ("int", 4): "int4",
        ("float", 8): "float8_e4m3fn",
        ("float", 4): "float4_e2m1fn",
    }
    kind = kinds.get((args.get("type") or "int", args.get("num_bits") or 8))
    group, block = args.get("group_size"), read_block(args.get("block_structure"))
    strategy: Any = args.get("strategy") or (
        "tensor" if group is None else "channel" if group == -1 else "group"
    )
    is_readable = (
        strategy in ("tensor", "channel", "token", "group", "block") and args.get("actorder") != "group"
    )
    if kind == "float4_e2m1fn":
        is_readable = (strategy, group) in (("tensor_group", 16), ("group", 32))
    if kind is None or not is_readable or not given <= _KNOWN_ARGS | _HARMLESS_ARGS:
        raise CheckpointError(f"quantization_config has {dict(args)}, which cannot be read here")
    if strategy == "tensor_group":
        return TensorFormat(kind, "group", group_size=group, scale_dtype="float8_e4m3fn")
    # Files of MXFP4 need not name the dtype of their scales.
    has_exponents = kind == "float4_e2m1fn" or "uint8" in str(args.get("scale_dtype"))
    return TensorFormat(
        kind,
        strategy,
        group_size=group if strategy == "group" else None,
        scale_dtype="float8_e8m0fnu" if has_exponents else None,
        block_size=block if strategy == "block" else None,
        symmetric=args.get("symmetric", True),
        dynamic=bool(args.get("dynamic", False)),
    )


_NO_MATCH = 3


def _rank(name: str, module: nn.Module, targets: Iterable[str]) -> int:
    """How `targets` match a linear: 0 by its name, 1 by a pattern (from the start), 2 by a class, 3 not at all."""
    targets = list(targets)
    if name in targets:
        return 0
    if any(t.startswith("re:") and re.match(t.removeprefix("re:"), name) for t in targets):
        return 1
    classes = {base.__name__ for base in type(module).__mro__}
    return 2 if classes & set(targets) else _NO_MATCH
