"""`SmoothedLinear`: a float layer that divides its input by a smoothing vector, where no fold is possible."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.reference import migrate


class SmoothedLinear(nn.Linear):
    """`torch.nn.Linear` on smoothed inputs, y = (x / s) (W · diag(s))ᵀ + b (Xiao et al. 2022, eq. 3).

    Arguments are nn.Linear's. `weight` (out, in) is W · diag(s). The buffer `migration_scale` (in,) is s; it stays
    float32 when the layer is moved to another dtype. Input (*, in) → output (*, out), in the weight's dtype.
    """

    migration_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("migration_scale", torch.ones(in_features, device=device, dtype=torch.float32))

    @classmethod
    def from_float(cls, linear: nn.Linear, migration_scale: Tensor) -> Self:
        """The layer with the parameters of `linear`, whose weight is already W · diag(s). migration_scale: s (in,)."""
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.migration_scale = migration_scale.float()
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input (*, in) → (*, out)."""
        return F.linear(migrate(input, self.migration_scale).to(input.dtype), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.migration_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.migration_scale.dtype != scale.dtype:
            self.migration_scale = scale.to(self.migration_scale.device)
        return self
