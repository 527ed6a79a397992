"""Reuses the memory of one block's weights for the next: shapes repeat, and every fresh page costs a page fault."""

from collections import defaultdict

import torch
from torch import Tensor


class BufferPool:
    """Free tensors by shape, dtype and device. Two threads may use it at once."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = defaultdict(
            list
        )

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with arbitrary contents: a free one, or a new one."""
        try:  # not a check first: another thread may take the last one in between
            return self._free[shape, dtype, device].pop()
        except IndexError:
            return torch.empty(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Make a tensor free for reuse. The caller must not use it afterwards."""
        self._free[tensor.shape, tensor.dtype, tensor.device].append(tensor.detach())
