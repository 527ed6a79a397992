"""Memory that is used again: blocks of a model have the same shapes, and fresh pages cost a fault each."""

from collections import defaultdict

import torch
from torch import Tensor


class BufferPool:
    """Tensors that are no longer needed, by shape, dtype and device, for the next that needs such a one."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(
            list
        )

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with whatever contents: one that was given, or a new one."""
        try:  # a thread may be taking one at the same time
            return self._free[shape, dtype, device].pop()
        except IndexError:
            return torch.empty(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Offer a tensor that nothing uses any more."""
        self._free[tensor.shape, tensor.dtype, tensor.device].append(tensor.detach())

    def clear(self) -> None:
        """Let go of everything."""
        self._free.clear()
