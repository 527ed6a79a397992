"""Slices, merges and ranks of a quantized layer: parts of a layer compute parts of its output."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import parallelize_module

from qlinear.errors import SchemeError
from qlinear.formats.scheme import SCHEMES, Scheme, TensorFormat
from qlinear.nn import QLinear
from qlinear.nn.tensor_parallel import (
    ColwiseQLinear,
    RowwiseQLinear,
    merge,
    merge_qkv,
    slice_inputs,
    slice_outputs,
)

TOKEN = SCHEMES["w8a8"].activation
ALL = [
    *(SCHEMES[name] for name in ("w8a8", "w8a8-asym", "w8a8-static", "w8a16", "fp8")),
    Scheme("w4a16-g8", TensorFormat("int4", "group", group_size=8)),
    Scheme("w4a8-asym", TensorFormat("int4", "group", group_size=8, symmetric=False), TOKEN),
    Scheme("block", TensorFormat("float8_e4m3fn", "block", block_size=(4, 8))),
    Scheme("tensor", TensorFormat("int8", "tensor"), TOKEN),
]
named = pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)


class InputRange32:
    min, max = torch.full((32,), -4.0), torch.full((32,), 4.0)


def layer(scheme: Scheme, out: int = 24, bias: bool = True, seed: int = 0) -> QLinear:
    torch.manual_seed(seed)
    linear, migration = (
        nn.Linear(32, out, bias),
        torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5,
    )
    return QLinear.from_float(linear, scheme, InputRange32, migration)


def inputs() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)


@named
def test_slices_of_the_outputs_are_slices_of_the_output(scheme: Scheme) -> None:
    whole, x = layer(scheme), inputs()
    parts = [slice_outputs(whole, start, stop) for start, stop in ((0, 8), (8, 24))]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), whole(x), rtol=1e-6, atol=1e-6)
    again = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(again, whole.dequantize())


@named
def test_slices_of_the_inputs_hold_slices_of_the_weight(scheme: Scheme) -> None:
    whole = layer(scheme)
    parts = [slice_inputs(whole, start, stop) for start, stop in ((0, 8), (8, 32))]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), whole.dequantize())
    assert all(part.bias is None for part in parts)


@pytest.mark.parametrize("scheme", ALL[:-1], ids=lambda scheme: scheme.name)
def test_merged_layers_give_their_outputs_side_by_side(scheme: Scheme) -> None:
    gate, up = layer(scheme, 16, bias=False), layer(scheme, 8, seed=1)
    torch.testing.assert_close(
        merge([gate, up])(inputs()), torch.cat([gate(inputs()), up(inputs())], -1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_attention_is_divided_by_heads_with_kv_heads_repeated(ranks: int) -> None:
    heads, kv_heads, size = 4, 2, 4
    q, k, v = (layer(ALL[0], count * size, seed=count) for count in (heads, kv_heads, kv_heads))
    for rank in range(ranks):
        merged = merge_qkv(q, k, v, num_heads=heads, num_kv_heads=kv_heads, rank=rank, ranks=ranks)
        heads_of_rank = range(rank * heads // ranks, (rank + 1) * heads // ranks)
        needed = sorted({head // (heads // kv_heads) for head in heads_of_rank})
        expected = [part(inputs()).unflatten(-1, (-1, size))[:, rows].flatten(1)
                    for part, rows in ((q, list(heads_of_rank)), (k, needed), (v, needed))]  # fmt: skip
        assert torch.equal(merged(inputs()), torch.cat(expected, -1))


def test_layers_that_cannot_be_merged_are_refused() -> None:
    first, other = layer(ALL[0]), layer(ALL[0])
    other.migration_scale = other.migration_scale * 2
    with pytest.raises(SchemeError, match="their migration_scale must be equal"):
        merge([first, other])
    with pytest.raises(SchemeError, match="need one scheme and width"):
        merge([first, layer(SCHEMES["w8a16"])])
    with pytest.raises(SchemeError, match="scales per tensor cannot be stacked"):
        merge([layer(ALL[-1]), layer(ALL[-1])])
    with pytest.raises(SchemeError, match="do not divide over 3 ranks"):
        merge_qkv(first, first, first, num_heads=4, num_kv_heads=2, ranks=3)


def test_a_slice_through_a_group_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"multiples of 8, which share a scale; got 0:12 of 32"):
        slice_inputs(layer(ALL[5]), 0, 12)
    with pytest.raises(SchemeError, match=r"multiples of 4, which share a scale; got 2:24 of 24"):
        slice_outputs(layer(ALL[7]), 2, 24)


def network(scheme: Scheme) -> nn.Sequential:
    torch.manual_seed(5)
    down = QLinear.from_float(
        nn.Linear(24, 6), Scheme("rows", *_rows(scheme)), InputRange24, torch.rand(24) + 0.5
    )
    return nn.Sequential(layer(scheme), nn.Tanh(), down)


class InputRange24:
    min, max = torch.full((24,), -1.0), torch.full((24,), 1.0)


def _rows(scheme: Scheme) -> tuple[TensorFormat, TensorFormat | None]:
    """The scheme with groups of 4, which divide a rank's 12 inputs."""
    fmt = scheme.weight
    if fmt.group_size:
        fmt = TensorFormat(fmt.dtype, "group", group_size=4, symmetric=fmt.symmetric)
    if fmt.block_size:
        fmt = TensorFormat(fmt.dtype, "block", block_size=(4, 4))
    return fmt, scheme.activation


def run_rank(rank: int, port: int, folder: str) -> None:
    """One of two ranks: every scheme through a column-parallel and a row-parallel layer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for scheme in ALL:
        plan = {"0": ColwiseQLinear(), "2": RowwiseQLinear()}
        model = parallelize_module(network(scheme), mesh, plan)
        gathered = parallelize_module(layer(scheme), mesh, ColwiseQLinear(gather_output=True))
        whole = DTensor.from_local(inputs(), mesh, [Replicate()])
        results[scheme.name] = (model(inputs()), gathered(inputs()), gathered(whole), model[0].weight.shape)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_compute_what_one_computes(tmp_path: Path) -> None:
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        port = free_port.getsockname()[1]
    mp.spawn(run_rank, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for scheme in ALL:
            y, gathered, from_dtensor, shape = results[scheme.name]
            assert tuple(shape) == (12, 32)
            torch.testing.assert_close(y, network(scheme)(inputs()), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gathered, layer(scheme)(inputs()), rtol=1e-6, atol=1e-6)
            assert torch.equal(from_dtensor, gathered)


def test_only_quantized_layers_are_divided() -> None:
    with pytest.raises(SchemeError, match="divides a QLinear; got a Linear"):
        ColwiseQLinear()._apply(nn.Linear(2, 3), None)  # type: ignore[arg-type]
