"""The decoder blocks of a model, and the parameters that several blocks share."""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..errors import StructureError


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name, in the order of the module tree.

    A block is an element of an outermost `ModuleList` that has at least two matrices. Which blocks a text passes
    through, and in which order, is known only when it does. Raises StructureError if there is none.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks |= {
                f"{name}.{child}": block for child, block in module.named_children() if _is_block(block)
            }
    if not blocks:
        raise StructureError(
            f"{type(model).__name__} has no decoder blocks: no ModuleList whose elements hold two or more weight "
            "matrices. For a module that is not a stack of blocks use qlinear.quantize_"
        )
    return blocks


def _is_block(module: nn.Module) -> bool:
    return sum(parameter.dim() > 1 for parameter in module.parameters()) > 1


def shared_parameters(blocks: Iterable[nn.Module]) -> dict[nn.Module, frozenset[str]]:
    """The parameters of each block that another block has too, by their names in the block."""
    blocks = list(dict.fromkeys(blocks))
    holders = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    return {
        block: frozenset(name for name, p in block.named_parameters() if holders[id(p)] > 1)
        for block in blocks
    }
