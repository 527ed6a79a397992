"""What inspect says of a checkpoint is what its files hold, and what it plans is what the job then makes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import qlinear
from qlinear.api.inspect import Inspection, imagined_checkpoint
from qlinear.errors import SchemeError

from ..support.models import save_model

IDS = torch.arange(3, 35).reshape(4, 8)
SOURCES = {
    "llama": {"dtype": torch.bfloat16},
    "gemma3_text": {"tie_word_embeddings": True},
    "phi3": {"shard": "10KB"},
    "opt": {"ffn_dim": 45, "word_embed_proj_dim": 30},
}


@pytest.fixture(scope="module", params=SOURCES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(folder / "source", request.param, **SOURCES[request.param])
    qlinear.quantize(source, folder / "out", calibration=IDS)
    return source, folder / "out"


def file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor, as the safetensors library reads them."""
    files = folder.glob("*.safetensors")
    return {name: tensor.nbytes for file in files for name, tensor in load_file(file).items()}


def of_linear(name: str, tensors: dict[str, int]) -> int:
    return sum(nbytes for key, nbytes in tensors.items() if key.startswith(f"{name}."))


def test_its_bytes_are_those_of_the_files(made: tuple[Path, Path]) -> None:
    source, out = made
    found, before, after = qlinear.inspect(out), file_bytes(source), file_bytes(out)
    assert found.total_size == sum(after.values())
    assert found.total_size_before == sum(before.values())
    for linear in found.linears:
        if not of_linear(linear.name, after):  # a tied head: the embedding is its weight
            assert linear.scheme is None
            continue
        assert linear.bytes_after == of_linear(linear.name, after)
        assert linear.bytes_before == of_linear(linear.name, before)


def test_scale_shapes_are_those_of_the_files(made: tuple[Path, Path]) -> None:
    _, out = made
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    for linear in qlinear.inspect(out).linears:
        if linear.scheme is None:
            assert linear.scale_shape == ()
        else:
            assert linear.scheme == "w8a8"
            assert tuple(tensors[f"{linear.name}.weight"].shape) == linear.shape
            assert tuple(tensors[f"{linear.name}.weight_scale"].shape) == linear.scale_shape


def test_what_it_plans_is_what_the_job_makes(made: tuple[Path, Path]) -> None:
    source, out = made
    planned, finished = qlinear.inspect(source), qlinear.inspect(out)
    assert planned.total_size == finished.total_size
    assert planned.total_size_before == finished.total_size_before
    for plan, made_of_it in zip(planned.linears, finished.linears, strict=True):
        if plan.scheme is not None:
            assert plan == made_of_it


def test_a_config_alone_gives_the_plan_of_its_checkpoint(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = made
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    from_config, from_folder = qlinear.inspect(tmp_path / "config.json"), qlinear.inspect(tmp_path)
    assert from_config == from_folder == qlinear.inspect(source)


def test_ignored_linears_are_planned_in_float(made: tuple[Path, Path]) -> None:
    source, _ = made
    planned: Inspection = qlinear.inspect(source, ignore=["*layers.0.*"])
    for linear in planned.linears:
        assert (linear.scheme is None) == (".layers.0." in linear.name)


KEPT = [
    (architecture, format, keep)
    for architecture, format in (("falcon", "qlinear"), ("gpt2", "lmdeploy"), ("phi3", "lmdeploy"))
    for keep in ("unfolded", "always", "never")
] + [("mixtral", "qlinear", "always")]


@pytest.mark.parametrize(("architecture", "format", "keep"), KEPT)
def test_planned_homes_and_sizes_are_those_of_the_job(
    architecture: str, format: str, keep: str, tmp_path: Path
) -> None:
    options = {
        "falcon": {"num_kv_heads": 1, "new_decoder_architecture": True},
        "mixtral": {"num_local_experts": 3},
    }
    source = save_model(tmp_path / "source", architecture, **options.get(architecture, {}))
    planned = qlinear.inspect(source, format=format, migration_scale=keep)
    qlinear.quantize(source, tmp_path / "out", calibration=IDS, format=format, migration_scale=keep)
    made = qlinear.inspect(tmp_path / "out")
    assert planned.total_size == made.total_size
    found = {
        linear.name: (linear.migration, linear.folded_into, linear.bytes_after) for linear in made.linears
    }
    for linear in planned.linears:
        if linear.scheme is not None:
            assert found[linear.name] == (linear.migration, linear.folded_into, linear.bytes_after)
    if keep == "always":
        assert "kept" in {linear.migration for linear in planned.linears}


FORMATS = [
    ("w8a16", "compressed-tensors"), ("w4a16-g32", "compressed-tensors"), ("w8a8-static", "compressed-tensors"),
    ("fp8-static", "compressed-tensors"), ("fp8", "lmdeploy"), ("w4a16-g32", "awq"), ("w4a16-channel", "qlinear"),
    ("w8a8-asym", "qlinear"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "format"), FORMATS)
def test_planned_sizes_are_those_of_every_layout(scheme: str, format: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    source = save_model(tmp_path / "source", dtype=torch.bfloat16, num_key_value_heads=2, **wide)
    planned = qlinear.inspect(source, scheme, format=format)
    qlinear.quantize(source, tmp_path / "out", scheme, calibration=IDS, format=format)
    made = qlinear.inspect(tmp_path / "out")
    assert planned.total_size == made.total_size == sum(file_bytes(tmp_path / "out").values())
    assert [linear.bytes_after for linear in planned.linears] == [
        linear.bytes_after for linear in made.linears
    ]


def test_a_layout_without_a_place_for_vectors_is_refused_where_all_should_stay(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    with pytest.raises(SchemeError, match=r"'always' needs a format that holds it, lmdeploy or qlinear"):
        qlinear.inspect(source, migration_scale="always")
    with pytest.raises(SchemeError, match="does not fit the lmdeploy layout"):
        qlinear.inspect(source, "w8a16", format="lmdeploy")
    with pytest.raises(SchemeError, match="format must be one of"):
        qlinear.inspect(source, format="gguf")


def test_linears_that_share_an_input_are_one_group(tmp_path: Path) -> None:
    found = qlinear.inspect(save_model(tmp_path / "source"))
    group = {linear.name.removeprefix("model.layers.1."): linear.group for linear in found.linears}
    prefix = "model.layers.1."
    assert group["self_attn.k_proj"] == group["self_attn.v_proj"] == f"{prefix}self_attn.q_proj"
    assert group["mlp.up_proj"] == f"{prefix}mlp.gate_proj"
    assert group["mlp.down_proj"] == f"{prefix}mlp.down_proj"


# Widths as Llama-2-7B's, so that the figures of the field can be checked; nothing but the config is written.
LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "dtype": "float16",
}  # fmt: skip


@pytest.fixture
def llama_2_7b(tmp_path: Path) -> Path:
    config = LlamaConfig(**LLAMA_2_7B).to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def test_llama_2_7b_is_planned_from_its_config_to_the_byte(llama_2_7b: Path) -> None:
    found = qlinear.inspect(llama_2_7b)
    assert found.total_size_before == 13_476_831_232
    assert found.total_size == 7_006_265_344
    assert len(found.linears) == 32 * 7 + 1


@pytest.mark.slow
@pytest.mark.parametrize("format", ["lmdeploy", "qlinear"])
def test_llama_2_7b_with_every_vector_kept_is_planned_to_the_byte(format: str, llama_2_7b: Path) -> None:
    found = qlinear.inspect(llama_2_7b, format=format, migration_scale="always")
    assert found.total_size == 7_010_820_096
    assert [linear.migration for linear in found.linears].count("kept") == 32 * 7


def test_an_imagined_checkpoint_takes_no_memory(llama_2_7b: Path) -> None:
    checkpoint = imagined_checkpoint(llama_2_7b)
    assert checkpoint.nbytes == 13_476_831_232
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float16}


def test_what_a_format_cannot_hold_is_planned_by_no_command(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gpt2", n_embd=30, n_head=3, n_layer=2)
    for command in (qlinear.inspect, lambda *args: qlinear.quantize(args[0], tmp_path / "out", args[1])):
        with pytest.raises(SchemeError, match="--format qlinear or lmdeploy"):
            command(source, "w8a8")
    with pytest.raises(SchemeError, match="a format that holds it, qlinear; got 'lmdeploy'"):
        qlinear.quantize(source, tmp_path / "out", "none", format="lmdeploy", migration_scale="always")
