"""A model run block by block in lanes gives the output of a single forward."""

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlinear.errors import OutputError, StructureError
from qlinear.streaming.find_blocks import find_blocks
from qlinear.streaming.lanes import Call, Lane, Lanes, batches_of
from qlinear.streaming.spill import Spill


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["sum"] = shared.get("sum", torch.zeros(())) + x.sum()
        return x + self.down(torch.relu(self.up(x))) * scale


class Model(nn.Module):
    """Passes side inputs to its blocks, and visits the first one twice."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        shared: dict[str, Tensor] = {}
        x, scale = self.embed(input_ids), input_ids.float().mean() / 5
        for layer in [*self.layers, self.layers[0]]:
            x = layer(x, scale, shared=shared)
        return self.head(x) + shared["sum"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


TOKENS = torch.arange(60).reshape(6, 10) % 11


def test_stepping_gives_the_models_own_output(model: Model) -> None:
    with torch.no_grad():
        expected = torch.cat([model(**batch) for batch in batches_of(TOKENS, 2)])
        visited = []
        with Lanes(model, list(model.layers), batches_of(TOKENS, 2)) as lanes:
            while (block := lanes.at) is not None:
                visited.append(block)
                for lane in lanes:
                    lane.step()
            actual = torch.cat([lane.output for lane in lanes])
    assert torch.equal(actual, expected)
    assert visited == [*model.layers, model.layers[0]]


def test_other_blocks_weights_are_never_read(model: Model) -> None:
    with torch.no_grad():
        expected = model(TOKENS)
        saved = {name: p.clone() for name, p in model.layers.named_parameters()}
        for p in model.layers.parameters():
            p.fill_(torch.nan)
        with Lanes(model, list(model.layers), batches_of(TOKENS, 6)) as lanes:
            while (block := lanes.at) is not None:
                index = list(model.layers).index(block)
                for name, p in block.named_parameters():
                    p.copy_(saved[f"{index}.{name}"])
                lanes[0].step()
                for p in block.parameters():
                    p.fill_(torch.nan)
            assert torch.equal(lanes[0].output, expected)


def test_the_model_is_itself_again_afterwards(model: Model) -> None:
    with Lanes(model, list(model.layers), batches_of(TOKENS, 2)) as lanes:
        threads = list(lanes)
    assert not any(thread.is_alive() for thread in threads)
    assert not any("forward" in vars(layer) for layer in model.layers)


def step_through(model: Model) -> None:
    with Lanes(model, list(model.layers), batches_of(TOKENS, 6)) as lanes:
        while lanes.at is not None:
            lanes[0].step()


def test_an_error_inside_a_lane_reaches_the_caller(model: Model) -> None:
    model.head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"):
        step_through(model)


def test_an_error_before_the_first_block_leaves_no_thread(model: Model) -> None:
    with pytest.raises(IndexError), Lanes(model, list(model.layers), batches_of(TOKENS + 11, 2)):
        pass
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_micro_batches_at_different_blocks_are_refused(model: Model) -> None:
    with Lanes(model, list(model.layers), batches_of(TOKENS, 3)) as lanes:
        lanes[0].step()
        with pytest.raises(StructureError, match="different blocks"):
            _ = lanes.at


def test_blocks_are_the_elements_of_the_outermost_module_lists(model: Model) -> None:
    model.layers[1].experts = nn.ModuleList(Block(8) for _ in range(2))
    assert list(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(StructureError, match="no decoder blocks"):
        find_blocks(nn.Linear(2, 2))


def test_a_lane_that_is_closed_while_it_runs_ends_at_its_next_block() -> None:
    reached, go = threading.Event(), threading.Event()
    block = nn.Linear(2, 2)

    def model() -> None:
        reached.set()
        go.wait()
        lane = threading.current_thread()
        assert isinstance(lane, Lane)
        lane.wait_for(Call(block, block.forward, (), {}))
        raise AssertionError("it went on")

    lane = Lane(model, {})
    lane.start()
    reached.wait()
    ending = threading.Thread(target=lane.close)
    ending.start()
    go.set()
    ending.join(20)
    assert not lane.is_alive()


class Wide(nn.Module):
    """Blocks whose hidden states are large enough to spill, and that use a tensor which all lanes share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 256)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))
        self.register_buffer("mask", torch.randn(100, 256))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = first = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x) * self.mask
        return x + first


def test_hidden_states_that_wait_on_the_disk_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = Wide(), torch.randint(0, 11, (6, 100))
    batches = batches_of(tokens, 2)
    with (
        closing(Spill(0, tmp_path)) as spill,  # memory is always short
        torch.no_grad(),
        Lanes(model, list(model.layers), batches, spill) as lanes,
    ):
        while lanes.at is not None:
            assert all(lane.call.hidden.untyped_storage().nbytes() == 0 for lane in lanes if lane.call)
            for lane in lanes:
                lane.rehearse(Call.run)
                lane.step()
        outputs = torch.cat([lane.output for lane in lanes])
    assert torch.equal(outputs, model(tokens))
    # Each lane has one place, which it uses again and again; and the file has no name to be left behind.
    assert spill.file_size == 6 * 100 * 256 * 4
    assert not list(tmp_path.iterdir())


def test_nothing_goes_to_the_disk_while_there_is_room(tmp_path: Path) -> None:
    model, batches = Wide(), batches_of(torch.zeros(2, 100).long(), 1)
    with (
        closing(Spill(1 << 60, tmp_path)) as spill,
        torch.no_grad(),
        Lanes(model, list(model.layers), batches, spill) as lanes,
    ):
        for lane in lanes:
            lane.step()
    assert spill.file_size == 0


def test_a_disk_that_cannot_take_hidden_states_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--max-memory"):
        Spill(0, tmp_path / "nowhere")


class Cache:
    """Keys of all calls so far, as some models keep them even where none is asked for."""

    def __init__(self) -> None:
        self.keys = torch.empty(0, 4)


class Remembering(nn.Module):
    """A block that adds to a cache, and to what it is given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys = torch.cat([cache.keys, self.first(x).detach()])
        x += self.second(cache.keys).sum(0)
        return x


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Remembering()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(x.clone(), cache=Cache())
        return output


def test_a_rehearsal_leaves_no_trace_in_what_the_block_is_given() -> None:
    torch.manual_seed(0)
    model, x = Forgetful(), torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x)
        with Lanes(model, [model.block], [{"x": x}]) as lanes:
            rehearsed = [lanes[0].rehearse(Call.run) for _ in range(2)]
            lanes[0].step()
            assert torch.equal(lanes[0].output, expected)
    assert all(torch.equal(output, expected) for output in rehearsed)
