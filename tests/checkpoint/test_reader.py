"""A checkpoint is read as the safetensors library reads it, and damage is named before any work."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlinear.checkpoint.reader import Checkpoint
from qlinear.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "b.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.mask": torch.tensor([True, False, True]),
    "d.scalar": torch.tensor(7, dtype=torch.int64),
    "e.empty": torch.empty(0, 4, dtype=torch.float16),
    "f.fp8": torch.randn(8).to(torch.float8_e4m3fn),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path) -> Path:
    """Turn a single-file checkpoint into two shards with an index; returns the index."""
    (folder / "model.safetensors").unlink()
    names = sorted(TENSORS)
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, tensors in parts.items():
        save_file({name: TENSORS[name] for name in tensors}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file for file, tensors in parts.items() for name in tensors}})
    )
    return index


def write_header(file: Path, header: str, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + data)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_tensor_is_read_bit_for_bit(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert b"".join(map(bytes, checkpoint.chunks(name, size=5))) == (
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
        if tensor.dim():
            assert same_bytes(read, tensor)


def test_shards_are_read_as_one_file_is(folder: Path) -> None:
    shard(folder)
    checkpoint = Checkpoint.open(folder)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in TENSORS.items() if t.dtype.itemsize > 1)


def test_reading_into_a_buffer_fills_that_buffer(folder: Path) -> None:
    out = torch.zeros(4, 6)
    read = Checkpoint.open(folder).read("a.weight", out)
    assert read is out
    assert torch.equal(out, TENSORS["a.weight"])


def test_a_buffer_of_another_shape_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.weight.*\(6, 4\)"):
        Checkpoint.open(folder).read("a.weight", torch.zeros(6, 4))


@pytest.mark.parametrize("shared", [False, True])
def test_a_torch_checkpoint_is_read_without_unpickling_its_data(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    whole = torch.randn(6, 4)
    tensors = {"x": whole, "y": whole[2:4], "z": torch.randn(5).bfloat16()} if shared else {"x": whole}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_torch_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"x": Path("/tmp")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_checkpoint_of_any_format_and_strides_is_read(legacy: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    x = torch.randn(3, 4)
    tensors = {"x": x, "transposed": x.T, "part": x[:, 1:3], "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_dtypes_that_torch_lacks_are_copied_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    entry = {"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
    write_header(tmp_path / "model.safetensors", json.dumps(entry), b"abc")
    checkpoint = Checkpoint.open(tmp_path)
    assert [bytes(part) for part in checkpoint.chunks("x")] == [b"abc"]
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        checkpoint.read("x")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder.*nowhere"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no such folder.*\./nowhere"):
        Checkpoint.open("./nowhere")


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no-such-org/model is neither a folder nor a Hub id") as caught:
        Checkpoint.open("no-such-org/model")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_or_without_weights_is_no_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor an index"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_named_at_any_length(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep] if keep >= 0 else data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (truncated|damaged)"):
        Checkpoint.open(folder)


def test_bytes_after_the_last_tensor_are_damage(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="belong to none"):
        Checkpoint.open(folder)


def test_shards_are_read_whatever_the_index_says_of_each_tensor(folder: Path) -> None:
    """As in transformers: a tensor that no shard holds is missing, and one in another shard is found there."""
    index = shard(folder)
    content = json.loads(index.read_text())
    name = next(iter(TENSORS))
    content["weight_map"] = {"absent": "model-1.safetensors"} | dict.fromkeys(TENSORS, "model-2.safetensors")
    index.write_text(json.dumps(content))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert torch.equal(checkpoint.read(name), TENSORS[name])
    with pytest.raises(CheckpointError, match="holds no tensor named absent"):
        checkpoint.read("absent")


def test_sub_folders_that_a_checkpoint_needs_are_copied_and_adapters_are_not(folder: Path) -> None:
    before = Checkpoint.open(folder).other_files()
    for name in ("1_Pooling", "2_Dense", "onnx", "adapter", "code"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"")
    (folder / "code" / "layers.py").write_text("")
    (folder / "modules.json").write_text(
        json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    )
    for place in (folder, folder / "adapter"):
        (place / "adapter_config.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    copied = {str(file) for file in checkpoint.other_files()} - {str(file) for file in before}
    assert copied == {
        "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "code/layers.py"
    }  # fmt: skip
    assert checkpoint.adapters() == [".", "adapter"]


@pytest.mark.parametrize("escape", ["/etc/passwd", "../model.safetensors", "sub/../../x"])
def test_a_shard_path_that_leaves_the_folder_is_refused(folder: Path, escape: str) -> None:
    shard(folder).write_text(json.dumps({"weight_map": {"a.weight": escape}}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        Checkpoint.open(folder)


def test_a_linked_shard_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert torch.equal(Checkpoint.open(folder).read("a.weight"), TENSORS["a.weight"])


def f32(start: int, stop: int) -> str:
    return f'{{"dtype": "F32", "shape": [2], "data_offsets": [{start}, {stop}]}}'


BAD_HEADERS = {
    "overlap": (f'{{"x": {f32(0, 8)}, "y": {f32(4, 12)}}}', 12, "starts at byte"),
    "hole": (f'{{"x": {f32(0, 8)}, "y": {f32(12, 20)}}}', 20, "starts at byte"),
    "beyond the end": (f'{{"x": {f32(0, 8)}}}', 4, "truncated"),
    "negative": (f'{{"x": {f32(-8, 0)}}}', 8, "cannot take"),
    "wrong size": (f'{{"x": {f32(0, 12)}}}', 12, "cannot take"),
    "twice": (f'{{"x": {f32(0, 8)}, "x": {f32(0, 8)}}}', 8, "occurs twice"),
    "not json": ("{x", 0, "cannot be parsed"),
    "not an object": ("[1]", 0, "not an object"),
    "no offsets": ('{"x": {"dtype": "F32", "shape": [2]}}', 8, "malformed"),
    "entry is no object": ('{"x": 3}', 8, "malformed"),
    "unknown dtype": (
        '{"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}',
        8,
        "unknown dtype F33",
    ),
    "not utf-8": ("\udce9", 0, "cannot be parsed"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_corrupt_header_is_refused(folder: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    encoded = header.encode(errors="surrogateescape").ljust(8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused_without_reading_it(folder: Path, length: int) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="header claims"):
        Checkpoint.open(folder)


def test_a_quantized_checkpoint_opens_but_is_refused_where_floats_are_needed(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"already quantized.*awq"):
        checkpoint.require_unquantized()
    (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}')
    with pytest.raises(CheckpointError, match="fp8"):
        Checkpoint.open(folder).require_unquantized()


def test_only_files_that_are_not_weights_are_taken_over(folder: Path) -> None:
    kept = ["LICENSE", "generation_config.json", "modeling_x.py", "tokenizer.json", "vocab.txt"]
    left = [
        "x.bin",
        "x.pth",
        "x.gguf",
        "x.onnx",
        "consolidated.00.json",
        "README.md",
        ".hidden",
        "qlinear.json",
    ]
    for name in kept + left:
        (folder / name).write_text("x")
    for inside in ("original", "onnx"):
        (folder / inside).mkdir()
        (folder / inside / "params.json").write_text("x")
    (folder / "chat_template.jinja").symlink_to(folder / "LICENSE")
    assert [str(path) for path in Checkpoint.open(folder).other_files()] == sorted(
        [*kept, "chat_template.jinja"]
    )


def test_a_read_error_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(folder)

    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .Input/output error"):
        checkpoint.read("a.weight")


def test_a_file_that_shrinks_while_it_is_read_is_named(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it was changed"):
        checkpoint.read("a.weight")


def test_the_fingerprint_follows_the_content_and_not_the_place(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = Checkpoint.open(folder).fingerprint()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder, elsewhere, dirs_exist_ok=True)
    assert Checkpoint.open(elsewhere).fingerprint() == before
    save_file({**TENSORS, "a.weight": TENSORS["a.weight"] + 1}, elsewhere / "model.safetensors")
    assert Checkpoint.open(elsewhere).fingerprint() != before
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert Checkpoint.open(folder).fingerprint() != before


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (700, 801)])
def test_a_tensor_is_converted_while_it_is_read(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(stored)
    save_file({"other": torch.ones(3), "weight": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    out = torch.empty(shape, dtype=dtype)
    assert Checkpoint.open(tmp_path).read_as("weight", out) is out
    assert torch.equal(out, tensor.to(dtype))
