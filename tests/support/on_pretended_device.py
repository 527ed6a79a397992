"""Jobs on a device beside the CPU: a pretended one, which refuses what a GPU does, and gives the CPU's results.

Run by `test_device`, in a process of their own.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qlinear
from qlinear.api.calibrate import write_statistics
from qlinear.api.generate import generate
from qlinear.checkpoint.reader import Checkpoint
from qlinear.errors import DeviceError, SourceLostError
from qlinear.runtime import device as devices
from qlinear.runtime.device import CPU, Uploader, as_device, moved
from qlinear.streaming import streamed_model as streamed
from qlinear.streaming.meta_model import build_meta_model
from qlinear.streaming.streamed_model import StreamedModel
from qlinear.streaming.weight_map import WeightMap

from .models import contents, save_model, save_tokenizer
from .pretend import NAME, Backend, Pretend, with_pretend_device

IDS = torch.arange(3, 45).reshape(3, 14)
# The second of two: what forgets the index goes to the first.
THERE = f"{NAME}:1"
WIDE = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "searched": ("llama", {"num_hidden_layers": 1}, {"smooth": "auto", "keep_worst": 2, "scheme": "w8a8-static"}),
    "gptq": ("phi3", {}, {"algorithm": "gptq"}),
    "gptq in groups": ("llama", WIDE, {"algorithm": "gptq", "scheme": "w4a16-g32"}),
    "awq": ("llama", WIDE | {"num_hidden_layers": 1}, {"algorithm": "awq", "scheme": "w4a16-g32", "dtype": "bfloat16"}),
    "fp8": ("llama", {"dtype": torch.bfloat16}, {"scheme": "fp8", "dtype": "bfloat16"}),
    "kept": (
        "gemma3_text",
        {"tie_word_embeddings": True, "num_attention_heads": 2, "dtype": torch.bfloat16},
        {"dtype": "bfloat16", "format": "qlinear", "migration_scale": "always", "propagate": True},
    ),
    "fused": ("falcon", {"num_kv_heads": 1, "new_decoder_architecture": True}, {"propagate": True}),
    "transposed": ("gpt2", {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 64}, {"format": "qlinear"}),
    "experts": ("qwen3_moe", EXPERTS, {"algorithm": "gptq", "scheme": "w8a16"}),
    "head too": ("llama", {"tie_word_embeddings": True}, {"ignore": [], "scheme": "w8a8-asym", "propagate": True}),
    "without text": ("llama", {"num_hidden_layers": 3}, {"smooth": "off"}),
    "float": ("llama", {}, {"scheme": "none", "format": "qlinear"}),
}  # fmt: skip


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The pretended device takes the place of CUDA."""
    backend = with_pretend_device()
    monkeypatch.setattr(devices, "GPU", NAME)
    monkeypatch.setattr(devices, "_pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    # So small that every tensor takes several turns.
    monkeypatch.setattr(devices, "_CHUNK", 1 << 10)
    # The fused kernels of attention are the CPU's own, and round otherwise.
    plain = functools.partial(build_meta_model, attn_implementation="eager")
    monkeypatch.setattr(streamed, "build_meta_model", plain)
    calls = Pretend.calls
    yield backend
    assert Pretend.calls > calls, "nothing was computed on the device"


def both(folder: Path, source: Path, there: str = THERE, **options: Any) -> tuple[Path, Path]:
    """The same job on the CPU and on the device."""
    for name in ("cpu", there):
        qlinear.quantize(source, folder / name, calibration=IDS, device=name, **options)
    return folder / "cpu", folder / there


@pytest.mark.parametrize("case", CASES)
def test_a_job_writes_there_what_it_writes_on_the_cpu(case: str, backend: Backend, tmp_path: Path) -> None:
    kind, shape, options = CASES[case]
    source = save_model(tmp_path / "source", kind, **shape)
    here, there = both(tmp_path, source, **options)
    assert contents(here) == contents(there)
    costs = [
        qlinear.evaluate(here, source, data=IDS, device=name, dtype="float32") for name in ("cpu", THERE)
    ]
    assert costs[0] == costs[1]


def test_scales_are_refined_there(backend: Backend, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", attention_bias=True)
    options: dict[str, Any] = {"scheme": "w8a8-static", "format": "qlinear", "migration_scale": "always"}
    # For gradients torch has a thread for each device, and believes in the first alone.
    folders = both(tmp_path, source, f"{NAME}:0", refine=2, **options)
    qlinear.quantize(source, tmp_path / "plain", calibration=IDS, propagate=True, **options)
    here, there, plain = (Checkpoint.open(folder) for folder in (*folders, tmp_path / "plain"))
    changed = 0
    for name in here.tensors:
        found, expected = there.read(name).double(), here.read(name).double()
        # Up to the last place: a device's Adam takes its steps in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        changed += not torch.allclose(found, plain.read(name).double(), rtol=1e-4)
    assert changed > 10


def test_an_interrupted_job_goes_on_there(backend: Backend, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", num_hidden_layers=3, attention_bias=True)
    options: dict[str, Any] = {"propagate": True, "format": "qlinear", "scheme": "w8a8-static"}

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qlinear.quantize(
            source, tmp_path / THERE, calibration=IDS, device=THERE, progress=interrupt, **options
        )
    here, there = both(tmp_path, source, **options)
    assert contents(here) == contents(there)


def test_statistics_are_taken_and_used_there(backend: Backend, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", **EXPERTS)
    for suffix in ("safetensors", "pth"):
        files = [tmp_path / f"{name}.{suffix}" for name in ("cpu", THERE)]
        for name, file in zip(("cpu", THERE), files, strict=True):
            write_statistics(source, file, calibration=IDS, device=name)
    assert (
        files[0].with_suffix(".safetensors").read_bytes() == files[1].with_suffix(".safetensors").read_bytes()
    )
    here, there = both(tmp_path, source, stats=files[1])
    assert contents(here) == contents(there)


def test_text_is_continued_there(backend: Backend, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    save_tokenizer(source)
    qlinear.quantize(source, tmp_path / "out", calibration=IDS)
    assert generate(tmp_path / "out", "w5 w6 w7", 5) == generate(
        tmp_path / "out", "w5 w6 w7", 5, device=THERE
    )


def test_a_dry_run_is_made_there(backend: Backend, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", num_hidden_layers=4)
    assert qlinear.quantize(source, tmp_path / "out", calibration=IDS, device=THERE, plan=True).planned


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_it_computes_in_the_stored_dtype_where_the_device_does(
    has_bfloat16: bool, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path, dtype=torch.bfloat16))
    monkeypatch.setattr(Backend, "has_bfloat16", has_bfloat16)
    model = StreamedModel(checkpoint, device=as_device(THERE))
    assert model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    with model.loaded(next(iter(model.blocks.values()))) as block:
        assert {p.dtype for p in block.parameters()} == {model.dtype}


def test_weights_arrive_whole_and_the_next_ones_are_on_their_way(backend: Backend, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path, num_hidden_layers=4))
    model = StreamedModel(checkpoint, device=as_device(THERE))
    assert model._prefetch is not None
    memory = []
    for i, (name, block) in enumerate(model.blocks.items()):
        with model.loaded(block):
            for key, parameter in block.named_parameters():
                assert isinstance(parameter, Pretend)
                assert parameter.device == torch.device(THERE)
                assert torch.equal(parameter.cpu(), checkpoint.read(f"{name}.{key}"))
            memory.append({p.data_ptr() for p in block.parameters()})
            model._prefetch.flush()
            following = f"model.layers.{i + 1}"
            assert (model._prefetch._pending or ("",))[0] == ("" if i == 3 else following)
    assert memory[0] == memory[2]  # two blocks' memory serves them all
    assert memory[1] == memory[3]
    assert memory[0].isdisjoint(memory[1])


def test_blocks_may_come_in_any_order_and_twice(backend: Backend, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path, num_hidden_layers=4))
    model = StreamedModel(checkpoint, device=as_device(THERE))
    for i in (2, 0, 0, 3, 1, 1, 2):
        name = f"model.layers.{i}"
        with model.loaded(model.blocks[name]) as block:
            for key, parameter in block.named_parameters():
                assert torch.equal(parameter.cpu(), checkpoint.read(f"{name}.{key}"))


def test_a_parameter_that_is_given_up_after_it_was_counted_on_is_read_again(
    backend: Backend, tmp_path: Path
) -> None:
    """As two blocks may share one: what was in memory when the second was loaded ahead has left it since."""
    folder = save_model(tmp_path, num_hidden_layers=2)
    names = WeightMap(build_meta_model(folder), Checkpoint.open(folder), as_device(THERE))
    names.materialize("model.layers.0.mlp")
    ahead = names.load("model.layers.0")
    names.release("model.layers.0.mlp")
    names.assign("model.layers.0", ahead | names.load("model.layers.0", ahead))
    assert not any(p.is_meta for p in names.model.get_submodule("model.layers.0").parameters())


def test_bytes_that_cannot_be_read_are_named_when_their_block_is_due(
    backend: Backend, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path, num_hidden_layers=2))
    model = StreamedModel(checkpoint, device=as_device(THERE))
    blocks = list(model.blocks.values())
    with model.loaded(blocks[0]):
        (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceLostError, match=r"model\.safetensors"), model.loaded(blocks[1]):
        pass


def test_a_lift_converts_and_uses_a_buffer_again_when_it_is_free(backend: Backend) -> None:
    device = as_device(THERE)
    uploader, source = Uploader(device), torch.randn(9000)
    out = torch.empty(9000, dtype=torch.bfloat16, device=device)

    def fill(memory: memoryview, before: int) -> None:
        memory[:] = source.view(torch.uint8).numpy().data[before : before + len(memory)]

    with uploader.uploading():
        uploader.upload(fill, source.nbytes, torch.float32, out)
        assert isinstance(out, Pretend)
        assert bool(out.raw.isnan().any())  # not all of it has arrived: nobody has waited
    uploader.hand_over([out])
    assert torch.equal(out.cpu(), source.bfloat16())
    assert out.lent


def test_what_ranks_tell_each_other_arrives_on_their_own_device(backend: Backend) -> None:
    value = {"x": torch.ones(3, device=THERE), "n": [1, "two", (torch.zeros(2, device=THERE),)]}
    told = moved(value, CPU)
    assert told["x"].device == told["n"][2][0].device == CPU
    heard = moved(told, as_device(THERE))
    assert heard["x"].device == heard["n"][2][0].device == torch.device(THERE)
    assert heard["n"][:2] == value["n"][:2]


def test_moving_leaves_alone_what_is_there(backend: Backend) -> None:
    source = {"x": torch.ones(2), "name": "w"}
    there = moved(source, as_device(THERE))
    assert there["x"].device == torch.device(THERE)
    assert moved(source["x"], CPU) is source["x"]


def test_it_minds_its_own_tensors(backend: Backend) -> None:
    x = torch.arange(3.0, device=THERE)
    mixed = (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3) + x,
        lambda: torch.ones(3).add_(x),
        lambda: torch.ones(3)[x.long()],
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: x.where(torch.ones(3) > 0, 0.0),
        lambda: x + x.to(f"{NAME}:0"),
    )
    for mix in mixed:
        with pytest.raises(AssertionError):
            mix()
    with pytest.raises(RuntimeError):
        x.numpy()
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert bool(torch.empty(3, device=THERE).isnan().all())


@pytest.mark.parametrize(
    ("name", "count", "says"),
    [
        ("tpu", 2, "must be cpu"),
        ("meta", 2, "must be cpu"),
        (f"{NAME}:2", 2, f"this host has {NAME}:0 to {NAME}:1"),
        (f"{NAME}:1", 1, f"this host has {NAME}:0; use one"),
        (NAME, 0, "finds no GPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_once(
    name: str, count: int, says: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "count", count)
    torch.ones(1, device=NAME).cpu()
    with pytest.raises(DeviceError, match=f"device.*{name}.*{says}|device {says}.*{name}"):
        qlinear.quantize("demo", tmp_path / "out", device=name)
    assert contents(tmp_path) == {}


def test_each_process_of_a_host_has_its_own(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.ones(1, device=NAME).cpu()
    assert as_device(NAME) == torch.device(NAME, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert as_device(NAME) == torch.device(NAME, 1)
    assert as_device(f"{NAME}:0") == torch.device(NAME, 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DeviceError, match="--nproc-per-node 2"):
        as_device(NAME)
