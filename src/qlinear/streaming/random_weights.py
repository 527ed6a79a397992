"""What stands for a model's weights and for text where neither is at hand: enough to run a block of each kind.

A matrix is one random column, repeated without taking memory, so a block of any size can be run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.tokens import most_positions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKENS, _FEW = 64, 16


def longest(model: nn.Module) -> int:
    """How many tokens of one sequence a trial may take: at most half of all, and no more than the model does."""
    return min(TOKENS // 2, most_positions(_config(model)) or TOKENS)


def dummy_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """Token ids (rows, length) of the model's vocabulary, all different if there are so many."""
    return (torch.arange(rows * length) % int(_config(model).vocab_size)).view(rows, length)


def short_dummy_ids(model: nn.Module) -> Tensor:
    """Ids of two short sequences."""
    return dummy_ids(model, 2, min(_FEW, longest(model)))


def _config(model: nn.Module) -> "PreTrainedConfig":
    config: PreTrainedConfig = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return config


def kind_of(block: nn.Module) -> Any:
    """Equal for blocks that are built alike: of one type, whose parameters have the same names and shapes."""
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())


@contextmanager
def each_kind_once(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """While open, a block answers what the first of its kind has answered to arguments of the same shapes.

    Yields the names of the blocks that are running: one, or after a failure the one that failed, or none.
    """
    answers: dict[Any, Any] = {}
    running: list[str] = []

    def once(name: str, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            call = kind_of(block), *(t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if call not in answers:
                running.append(name)
                answers[call] = forward(*args, **kwargs)
                running.pop()
            return answers[call]

        return answer

    distinct = {block: name for name, block in blocks.items()}
    for block, name in distinct.items():
        block.forward = once(name, block, block.forward)
    try:
        yield running
    finally:
        for block in distinct:
            del block.forward


def _random(module: nn.Module, parameter: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(parameter.numel())
    if isinstance(module, nn.Embedding):
        # Only the first rows are ever looked up; the pages of the others are never touched.
        table = torch.zeros(parameter.shape)
        table[:TOKENS] = torch.randn(table[:TOKENS].shape, generator=generator)
        return table
    if parameter.dim() < 2:
        return 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    column = torch.randn((*parameter.shape[:-1], 1), generator=generator)
    matrix: Tensor = (column / parameter.shape[-1] ** 0.5).expand(parameter.shape)
    return matrix


def one_column_weights(module: nn.Module, parameter: Tensor) -> Tensor:
    """Tables of embeddings too are one column, and everything has the dtype that it will have."""
    generator = torch.Generator().manual_seed(parameter.numel())
    last = parameter.shape[-1] if parameter.dim() > 1 else 1
    column = torch.randn((*parameter.shape[: parameter.dim() - 1], 1), generator=generator) / last**0.5
    one_column_weights: Tensor = column.to(parameter.dtype).expand(parameter.shape)
    return one_column_weights


@contextmanager
def random_weights(
    modules: Iterable[nn.Module], make: Callable[[nn.Module, Tensor], Tensor] = _random
) -> Iterator[None]:
    """While open, these modules' own parameters, where they are on meta, hold random numbers."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module._parameters.update, dict(module._parameters))
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(make(module, parameter), requires_grad=False)
        yield
