"""Random weights and dummy text, to run blocks of any size before a weight is read.

A random matrix is one random column, expanded along `in`, so it takes the memory of one column.
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
    """The longest sequence for a trial run: at most half of `TOKENS`, and at most the model's positions."""
    return min(TOKENS // 2, most_positions(_config(model)) or TOKENS)


def dummy_ids(model: nn.Module, rows: int, length: int) -> Tensor:
    """Token ids (rows, length) of the model's vocabulary, all different where the vocabulary is large enough."""
    return (torch.arange(rows * length) % int(_config(model).vocab_size)).view(rows, length)


def short_dummy_ids(model: nn.Module) -> Tensor:
    """Token ids of two short sequences."""
    return dummy_ids(model, 2, min(_FEW, longest(model)))


def _config(model: nn.Module) -> "PreTrainedConfig":
    config: PreTrainedConfig = model.config.get_text_config()  # type: ignore[operator,union-attr]
    return config


def kind_of(block: nn.Module) -> Any:
    """A key that is equal for blocks of the same class whose parameters have the same names and shapes."""
    return type(block), tuple((name, p.shape) for name, p in block.named_parameters())


@contextmanager
def one_run_per_kind(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Context manager: of each kind of block, one runs, once per shapes of its arguments; others return its output.

    Yields the names of the blocks that are running now. After a failure it names the block that failed.
    """
    outputs: dict[Any, Any] = {}
    running: list[str] = []

    def once(name: str, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_once(*args: Any, **kwargs: Any) -> Any:
            call = kind_of(block), *(t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if call not in outputs:
                running.append(name)
                outputs[call] = forward(*args, **kwargs)
                running.pop()
            return outputs[call]

        return forward_once

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
        # Only the first rows are looked up, so the zero pages of the others take no memory.
        table = torch.zeros(parameter.shape)
        table[:TOKENS] = torch.randn(table[:TOKENS].shape, generator=generator)
        return table
    if parameter.dim() < 2:
        return 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    column = torch.randn((*parameter.shape[:-1], 1), generator=generator)
    matrix: Tensor = (column / parameter.shape[-1] ** 0.5).expand(parameter.shape)
    return matrix


def one_column_weights(module: nn.Module, parameter: Tensor) -> Tensor:
    """A random parameter of the right dtype; embeddings too are one expanded column, unlike in `random_weights`."""
    generator = torch.Generator().manual_seed(parameter.numel())
    last = parameter.shape[-1] if parameter.dim() > 1 else 1
    column = torch.randn((*parameter.shape[: parameter.dim() - 1], 1), generator=generator) / last**0.5
    weight: Tensor = column.to(parameter.dtype).expand(parameter.shape)
    return weight


@contextmanager
def random_weights(
    modules: Iterable[nn.Module], make: Callable[[nn.Module, Tensor], Tensor] = _random
) -> Iterator[None]:
    """Context manager: the modules' own parameters that are on meta are replaced by random ones.

    make: returns the random tensor for a module and its parameter.
    """
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module._parameters.update, dict(module._parameters))
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[name] = nn.Parameter(make(module, parameter), requires_grad=False)
        yield
