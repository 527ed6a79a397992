"""A layout loses nothing, and compressed-tensors' own package accepts and reads what ours writes."""

import itertools

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor, nn

from qlinear.checkpoint.layouts import LAYOUTS, awq, compressed_tensors, get_layout, layout_of, lmdeploy
from qlinear.checkpoint.layouts.base import QuantizedLinear, scale_dtype
from qlinear.errors import CheckpointError, SchemeError
from qlinear.formats.rounding import quantize_tensor
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat

INT8 = TensorFormat("int8", "token", dynamic=True)
FP8 = TensorFormat("float8_e4m3fn", "token", dynamic=True)
SHAPE = (16, 256)

_W4 = TensorFormat("int4", "group", group_size=128)
_W4_ASYM = TensorFormat("int4", "group", group_size=64, symmetric=False)
_FP8_BLOCK = TensorFormat("float8_e4m3fn", "block", block_size=(128, 128))
EVERY = dict(SCHEMES) | {
    scheme.name: scheme
    for scheme in (
        Scheme("w8a16-asym", TensorFormat("int8", symmetric=False)),
        Scheme("w8a8-asym-weight", TensorFormat("int8", symmetric=False), INT8),
        Scheme("w4a16", _W4),
        Scheme("w4a16-asym", _W4_ASYM),
        Scheme("w4a16-channel", TensorFormat("int4", "channel")),
        Scheme("w4a8", _W4, INT8),
        Scheme("fp8", TensorFormat("float8_e4m3fn", "channel"), FP8),
        Scheme(
            "fp8-static", TensorFormat("float8_e4m3fn", "tensor"), TensorFormat("float8_e4m3fn", "tensor")
        ),
        Scheme("fp8-block", _FP8_BLOCK, TensorFormat("float8_e4m3fn", "group", group_size=128, dynamic=True)),
    )
}
HELD_BY = {
    "compressed-tensors": list(EVERY),
    "qlinear": list(EVERY),
    "lmdeploy": ["w8a8", "fp8"],
    "awq": [name for name in EVERY if name.startswith("w4a16")],
}
CASES = [(layout, scheme) for layout, schemes in HELD_BY.items() for scheme in schemes]


def linear_of(scheme: Scheme, shape: tuple[int, int] = SHAPE) -> QuantizedLinear:
    dtype = scale_dtype(scheme, torch.bfloat16)
    torch.manual_seed(0)
    weight = quantize_tensor(torch.randn(shape) + 0.3, scheme.weight, scale_dtype=dtype)
    activation = scheme.activation
    needs_zero = activation is not None and scheme.is_static and not activation.symmetric
    return QuantizedLinear(
        scheme,
        weight,
        dtype,
        torch.tensor([0.25]) if scheme.is_static else None,
        torch.tensor([-7.0]) if needs_zero else None,
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.float(), b.float())


def same_linear(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    fields = ("input_scale", "input_zero_point", "migration_scale")
    return (
        same(a.weight.codes, b.weight.codes)
        and same(a.weight.scale, b.weight.scale)
        and same(a.weight.zero_point, b.weight.zero_point)
        and same(a.weight.global_scale, b.weight.global_scale)
        and a.scale_dtype == b.scale_dtype
        and all(same(getattr(a, field), getattr(b, field)) for field in fields)
    )


@pytest.mark.parametrize(("layout", "scheme"), CASES)
def test_unpack_after_pack_is_the_identity(layout: str, scheme: str) -> None:
    linear = linear_of(EVERY[scheme])
    tensors = get_layout(layout).pack("model.x", linear)
    assert all(name.startswith("model.x.") and tensor.is_contiguous() for name, tensor in tensors.items())
    back = get_layout(layout).unpack("model.x", tensors, EVERY[scheme])
    if layout == "awq" and linear.weight.zero_point is None:
        assert back.weight.zero_point is not None
        assert not back.weight.zero_point.any()
        assert torch.equal(back.weight.dequantize(), linear.weight.dequantize())
    else:
        assert same_linear(back, linear)


def test_four_bit_codes_that_lie_one_to_a_byte_are_read_too() -> None:
    """As llmcompressor writes W4A8: in groups, and int-quantized."""
    linear = linear_of(EVERY["w4a8"])
    tensors = {"x.weight": linear.weight.codes, "x.weight_scale": linear.weight.scale.to(linear.scale_dtype)}
    assert same_linear(compressed_tensors.unpack("x", tensors, EVERY["w4a8"]), linear)


@pytest.mark.parametrize(("layout", "scheme"), CASES)
def test_a_scheme_is_read_from_the_config_it_was_written_to(layout: str, scheme: str) -> None:
    linears = {name: nn.Linear(2, 2) for name in ("model.a", "model.b", "lm_head")}
    config = get_layout(layout).quantization_config(EVERY[scheme], ["lm_head"])
    schemes = get_layout(layout).schemes_from_config(config, linears)
    assert set(schemes) == {"model.a", "model.b"}
    wanted = EVERY[scheme]
    if layout != "awq":
        assert {(s.weight, s.activation) for s in schemes.values()} == {(wanted.weight, wanted.activation)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_presets_keep_their_names(scheme: str) -> None:
    config = compressed_tensors.quantization_config(SCHEMES[scheme], [])
    assert compressed_tensors.schemes_from_config(config, {"a": nn.Linear(2, 2)}) == {"a": SCHEMES[scheme]}


@pytest.mark.parametrize("scheme", EVERY)
def test_compressed_tensors_validates_the_config(scheme: str) -> None:
    config = compressed_tensors.quantization_config(EVERY[scheme], ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (
        EVERY[scheme].weight.bits,
        EVERY[scheme].weight.symmetric,
    )
    assert parsed.ignore == ["lm_head"]


def test_compressed_tensors_validates_a_mixed_config() -> None:
    schemes = {"a": EVERY["w8a8"], "b": EVERY["w4a16"], "c": EVERY["w8a8"]}
    config = compressed_tensors.quantization_config(schemes, ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    assert config["format"] == "mixed-precision"
    assert [group.format for group in parsed.config_groups.values()] == ["int-quantized", "pack-quantized"]
    linears = {name: nn.Linear(2, 2) for name in ("a", "b", "c", "d", "lm_head")}
    assert compressed_tensors.schemes_from_config(config, linears) == schemes


@pytest.mark.parametrize("scheme", EVERY)
def test_compressed_tensors_decompresses_to_our_numbers(scheme: str) -> None:
    linear = linear_of(EVERY[scheme], (128, 256))
    config = compressed_tensors.quantization_config(EVERY[scheme], [])
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = {n.removeprefix("x."): t for n, t in compressed_tensors.pack("x", linear).items()}
    decompressed = BaseCompressor.get_value_from_registry(config["format"]).decompress(tensors, group)[
        "weight"
    ]
    expected = linear.weight.dequantize()
    # That package decompresses NVFP4 in bfloat16.
    is_exact = linear.scale_dtype == torch.float32 and not linear.weight.format.has_global_scale
    tolerance = 0 if is_exact else 2**-8
    assert torch.allclose(decompressed.float(), expected, rtol=tolerance, atol=0)


def test_targets_match_names_before_patterns_before_classes() -> None:
    def group(targets: list[str], bits: int, strategy: str) -> dict[str, object]:
        return {"targets": targets, "weights": {"num_bits": bits, "strategy": strategy}}

    groups = {
        "0": group(["Linear"], 8, "channel"),
        "1": group([r"re:.*\.mlp\..*"], 4, "channel"),
        "2": group(["model.mlp.up"], 8, "tensor"),
    }
    config = {"config_groups": groups, "ignore": ["lm_head", "re:.*gate$"]}
    names = ("model.q", "model.mlp.up", "model.mlp.down", "model.mlp.gate", "lm_head")
    schemes = compressed_tensors.schemes_from_config(config, {name: nn.Linear(2, 2) for name in names})
    kinds = {name: (scheme.weight.dtype, scheme.weight.granularity) for name, scheme in schemes.items()}
    assert kinds == {
        "model.q": ("int8", "channel"),
        "model.mlp.up": ("int8", "tensor"),
        "model.mlp.down": ("int4", "channel"),
    }


@pytest.mark.parametrize(
    "args",
    [{"num_bits": 2}, {"num_bits": 8, "actorder": "group"}, {"num_bits": 4, "type": "float"}, {"novel": 1}],
)
def test_a_config_that_cannot_be_read_is_refused(args: dict[str, object]) -> None:
    config = {"config_groups": {"0": {"targets": ["Linear"], "weights": {"strategy": "channel", **args}}}}
    with pytest.raises(CheckpointError, match="cannot be read here"):
        compressed_tensors.schemes_from_config(config, {"x": nn.Linear(2, 2)})


@pytest.mark.parametrize("layout", ["lmdeploy", "awq"])
def test_a_scheme_that_a_layout_cannot_hold_is_refused(layout: str) -> None:
    for name in EVERY.keys() - set(HELD_BY[layout]):
        with pytest.raises(SchemeError, match=f"scheme {name} does not fit the {layout} layout"):
            get_layout(layout).quantization_config(EVERY[name], [])
        with pytest.raises(SchemeError, match="does not fit"):
            get_layout(layout).pack("x", linear_of(EVERY[name], (128, 256)))
    with pytest.raises(SchemeError, match="exactly one scheme, got fp8, w8a8"):
        get_layout(layout).quantization_config({"a": EVERY["w8a8"], "b": EVERY["fp8"]}, [])


def test_awq_refuses_outputs_that_do_not_fill_its_words() -> None:
    with pytest.raises(SchemeError, match="x has 12 outputs"):
        awq.pack("x", linear_of(EVERY["w4a16"], (12, 256)))


def with_migration(linear: QuantizedLinear) -> QuantizedLinear:
    scale = torch.arange(1.0, linear.weight.codes.shape[1] + 1)
    return QuantizedLinear(linear.scheme, linear.weight, linear.scale_dtype, migration_scale=scale)


@pytest.mark.parametrize("layout", ["qlinear", "lmdeploy"])
def test_a_migration_scale_is_kept_where_there_is_a_place(layout: str) -> None:
    linear = with_migration(linear_of(EVERY["w8a8"]))
    tensors = get_layout(layout).pack("x", linear)
    assert tensors["x.migration_scale"].shape == (256,)
    assert same_linear(get_layout(layout).unpack("x", tensors, linear.scheme), linear)


@pytest.mark.parametrize(("layout", "scheme"), [("compressed-tensors", "w8a8"), ("awq", "w4a16")])
def test_a_migration_scale_is_refused_where_there_is_none(layout: str, scheme: str) -> None:
    with pytest.raises(SchemeError, match="x keeps a migration scale"):
        get_layout(layout).pack("x", with_migration(linear_of(EVERY[scheme])))


PAIRS = [(a, b) for a, b in itertools.permutations(LAYOUTS, 2) if set(HELD_BY[a]) & set(HELD_BY[b])]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_converting_between_layouts_touches_no_code(first: str, second: str) -> None:
    symmetric = {
        name for name in HELD_BY["awq"] if EVERY[name].weight.symmetric
    }  # comes back with a zero point
    for name in set(HELD_BY[first]) & set(HELD_BY[second]) - symmetric:
        linear = linear_of(EVERY[name])
        read = get_layout(first).unpack("x", get_layout(first).pack("x", linear), linear.scheme)
        again = get_layout(second).unpack("x", get_layout(second).pack("x", read), linear.scheme)
        assert same_linear(again, linear)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"x\.weight_scale is missing"):
        compressed_tensors.unpack("x", {}, EVERY["w8a8"])


def test_modules_are_excluded_by_whole_parts_of_their_names() -> None:
    linears = {name: nn.Linear(2, 2) for name in ("lm_head", "lm_head_2", "a.vision.fc", "a.fc")}
    config = lmdeploy.quantization_config(EVERY["w8a8"], ["lm_head", "vision"])
    assert set(lmdeploy.schemes_from_config(config, linears)) == {"lm_head_2", "a.fc"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_by_the_config_it_writes(layout: str) -> None:
    config = get_layout(layout).quantization_config(EVERY[HELD_BY[layout][0]], [])
    assert layout_of(config) == (layout, LAYOUTS[layout])


def test_unknown_layouts_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemeError, match="compressed-tensors, lmdeploy, awq, qlinear; got 'gguf'"):
        get_layout("gguf")
    with pytest.raises(CheckpointError, match="quant_method 'gptq'"):
        layout_of({"quant_method": "gptq"})
