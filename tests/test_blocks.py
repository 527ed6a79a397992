"""Lanes: a model stepped through block by block gives what it gives in one go."""

import threading

import pytest
import torch
from torch import Tensor, nn

from qlinear.blocks import Call, Lane, Lanes, batches_of, find_blocks
from qlinear.errors import StructureError


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


def test_micro_batches_that_part_are_refused(model: Model) -> None:
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


def test_a_lane_that_is_ended_while_it_runs_ends_at_its_next_block() -> None:
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
