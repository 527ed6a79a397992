"""Numbers to codes and back. Nothing else in qlinear rounds.

    choose_qparams, qparams_from_range    scale and zero point
    quantize, dequantize                  numbers to codes, codes to numbers
    nearest_values, nearest_steps_        both at once, for searches
    input_qparams, fake_quantize_input    the same for an input
    QuantizedTensor, quantize_tensor      codes with what is needed to read them; round to nearest

A tensor consists of tiles that share a scale (`TensorFormat.tile`). Weights are rounded a few tiles at a time, in one
small buffer. A float32 copy of a whole weight would pass through main memory seven times, and a fresh page of memory
costs more than the arithmetic done on it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from ..errors import SchemeError
from .finite import require_finite
from .scales import global_scale_of, scale_from_absmax, storable_scale
from .scheme import TensorFormat

# Elements of a float32 working copy that stay in a core's cache.
_CHUNK = 1 << 17


def _tiles(x: Tensor, fmt: TensorFormat) -> tuple[Tensor, tuple[int, ...]]:
    """`x` padded and viewed as (..., row tiles, rows, column tiles, columns), and the dims of a tile."""
    if fmt.granularity == "tensor":
        return x.reshape(1, -1), (1,)
    rows, columns = fmt.tile(x.shape)
    if fmt.granularity != "block":
        return x.reshape(*x.shape[:-1], -1, columns) if columns else x.unsqueeze(-2), (-1,)
    pad_rows, pad_columns = -x.shape[-2] % rows, -x.shape[-1] % columns
    padded = torch.nn.functional.pad(x, (0, pad_columns, 0, pad_rows))
    height, width = padded.shape[-2:]
    return padded.reshape(*x.shape[:-2], height // rows, rows, width // columns, columns), (-3, -1)


def per_element(scale: Tensor, fmt: TensorFormat, shape: torch.Size) -> Tensor:
    """A scale or zero point, expanded so that it broadcasts against a tensor of `shape`."""
    if fmt.granularity in ("tensor", "channel", "token"):
        return scale
    rows, columns = fmt.tile(shape)
    spread = scale.repeat_interleave(columns, -1)[..., : shape[-1]]
    return spread.repeat_interleave(rows, -2)[..., : shape[-2], :] if rows > 1 else spread


def choose_qparams(
    x: Tensor,
    fmt: TensorFormat,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a tensor, from its extremes.

    x: (*, in), any float dtype. scale_dtype, global_scale: see `storable_scale`; a format with a global scale takes
    that of x if none is given. Returns scale (`fmt.scale_shape(x.shape)`, float32, as it can be stored) and zero_point
    (same shape, float32 holding integers), None if symmetric. An all-zero tile, or one whose scale would underflow,
    gets scale 1, so its codes are 0 and nothing divides by zero.

    Symmetric: scale = absmax / steps. Asymmetric (Jacob et al. 2018, eq. 1-3): the range is widened to contain 0,
    scale = (max - min) / (2^b - 1), zero_point = clamp(round(low - min / scale), low, high).
    """
    if x.numel() == 0:
        ones = torch.ones(fmt.scale_shape(x.shape), dtype=torch.float32, device=x.device)
        return ones, None if fmt.symmetric else torch.zeros_like(ones)
    tiles, dims = _tiles(x, fmt)
    low, high = tiles.amin(dims).float(), tiles.amax(dims).float()
    if fmt.has_global_scale and global_scale is None:
        global_scale = global_scale_of(torch.maximum(high, -low).amax())
    return qparams_from_range(low, high, fmt, scale_dtype, global_scale)


def qparams_from_range(
    low: Tensor,
    high: Tensor,
    fmt: TensorFormat,
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the least and greatest value of each tile (float32, the scale's shape)."""
    if fmt.symmetric:
        return scale_from_absmax(torch.maximum(high, -low), fmt, scale_dtype, global_scale), None
    first, last = fmt.code_range
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Each end is divided on its own, because high - low may overflow where both are finite.
    scale = storable_scale(high / (last - first) - low / (last - first), fmt, scale_dtype)
    return scale, (first - low / scale).round().clamp(first, last)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Codes of `x` (its shape, `fmt.storage`): clamp(round(x / scale) + zero_point), half to even.

    Raises nothing for NaN: callers check inputs with `require_finite`, which can name the tensor.
    """
    zero = None if zero_point is None else per_element(zero_point, fmt, x.shape)
    return _round_(x.float() / per_element(scale, fmt, x.shape), zero, fmt).to(fmt.storage)


def _round_(scaled: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Values divided by their scale to codes, in place."""
    if fmt.dtype == "float4_e2m1fn":
        return _round_e2m1_(scaled)
    if not fmt.is_float:
        scaled.round_()
    if zero_point is not None:
        scaled += zero_point
    return scaled.clamp_(*fmt.code_range)


def _round_e2m1_(scaled: Tensor) -> Tensor:
    """Values to the nearest of 0, ½, 1, 1½, 2, 3, 4 and 6 with either sign, ties to the even mantissa, in place."""
    size = scaled.clamp_(-6, 6).abs()
    step = (
        (size >= 2).float().add_(1).add_(size >= 4, alpha=2).mul_(0.5)
    )  # ½ below 2, 1 below 4, 2 from there on
    return scaled.div_(step).round_().mul_(step)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """(codes - zero_point) * scale in float32, the shape of `codes`."""
    x = codes.float()
    if zero_point is not None:
        x -= per_element(zero_point, fmt, codes.shape).float()
    return x.mul_(per_element(scale, fmt, codes.shape))


def nearest_values(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """`dequantize` of `quantize` without the codes, for searches.

    x: float32. scale, zero_point: broadcast against x.
    """
    return nearest_steps_(x / scale, zero_point, fmt).mul_(scale)


def nearest_steps_(scaled: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Values divided by their scale to the nearest grid points, in place.

    scaled: float32. zero_point: broadcasts against it. A grid point is a code minus its zero point.
    """
    if fmt.dtype == "float4_e2m1fn":
        return _round_e2m1_(scaled)
    if fmt.is_float:
        return scaled.copy_(scaled.clamp_(*fmt.code_range).to(fmt.storage))
    scaled.round_()
    if zero_point is None:
        return scaled.clamp_(*fmt.code_range)
    return scaled.add_(zero_point).clamp_(*fmt.code_range).sub_(zero_point)


def input_qparams(low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """What calibration fixes of a static input: its scale (1,) and zero point (1,), or its global scale (1,) and None.

    low, high: the least and greatest value of the input, float32, one element each.
    """
    low, high = low.reshape(1), high.reshape(1)
    if fmt.has_global_scale:
        return global_scale_of(torch.maximum(high, -low)), None
    return qparams_from_range(low, high, fmt)


def fake_quantize_input(
    x: Tensor, fmt: TensorFormat, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """The numbers that a layer computes with where its scheme rounds the input: `dequantize` of `quantize`.

    x: (*, in), any float dtype. scale, zero_point: the static ones, from `input_qparams`; without a scale both are
    chosen from x. Returns the shape of x, float32.
    """
    if scale is None or fmt.has_global_scale:
        scale, zero_point = choose_qparams(x, fmt, global_scale=scale)
    return dequantize(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes with what is needed to read them. Algorithms return it, and layouts write it.

    codes: (..., out, in), `format.storage`. scale: `format.scale_shape(codes.shape)`, float32.
    zero_point: the scale's shape, float32 holding integers, None if symmetric. global_scale: the divisor (1,) float32
    of stored scales, (n, 1, 1) of a stack, None for formats without one; `scale` has been divided by it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: TensorFormat
    global_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, float32, the shape of the codes."""
        return dequantize(self.codes, self.scale, self.zero_point, self.format)

    def rows(self, part: slice) -> "QuantizedTensor":
        """The rows of a matrix in `part`, as views. Raises SchemeError for less than all where rows share scales."""
        if part.indices(len(self.codes)) == (0, len(self.codes), 1):
            return self
        if self.format.granularity in ("tensor", "block"):
            raise SchemeError(
                f"granularity {self.format.granularity!r} shares scales between rows: take all of them"
            )
        return self._map(itemgetter(part))

    def unstack(self) -> list["QuantizedTensor"]:
        """The members of a stack (n, out, in), as views: the inverse of `stack`."""
        members = [self._map(itemgetter(i)) for i in range(len(self.codes))]
        if self.global_scale is None:
            return members
        return [
            replace(member, global_scale=shared.reshape(1))
            for member, shared in zip(members, self.global_scale, strict=True)
        ]

    @staticmethod
    def concatenate(parts: "Sequence[QuantizedTensor]") -> "QuantizedTensor":
        """One matrix from runs of its rows, all of one format and global scale."""
        return parts[0] if len(parts) == 1 else _joined(parts, torch.cat)

    @staticmethod
    def stack(members: "Sequence[QuantizedTensor]") -> "QuantizedTensor":
        """A stack (n, out, in) of matrices of one shape and format; global scales become (n, 1, 1)."""
        shared = [member.global_scale for member in members if member.global_scale is not None]
        joined = _joined(members, torch.stack)
        return replace(joined, global_scale=torch.cat(shared).view(-1, 1, 1)) if shared else joined

    def _map(self, change: Callable[[Tensor], Tensor]) -> "QuantizedTensor":
        zero_point = None if self.zero_point is None else change(self.zero_point)
        return replace(self, codes=change(self.codes), scale=change(self.scale), zero_point=zero_point)


def _joined(parts: Sequence[QuantizedTensor], join: Callable[[list[Tensor]], Tensor]) -> QuantizedTensor:
    """Several tensors of one format as one."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedTensor(
        join([part.codes for part in parts]), join([part.scale for part in parts]),
        join(zeros) if zeros else None, parts[0].format, parts[0].global_scale,
    )  # fmt: skip


def quantize_tensor(
    x: Tensor,
    fmt: TensorFormat,
    name: str = "weight",
    scale_dtype: torch.dtype = torch.float32,
    global_scale: Tensor | None = None,
) -> QuantizedTensor:
    """Round to nearest, with scales from the extremes of each tile.

    x: (..., out, in), any float dtype. scale_dtype, global_scale: see `choose_qparams`. Raises NumericsError, with
    `name`, on NaN or infinity, and SchemeError where the format does not fit the shape.
    """
    if fmt.has_global_scale and global_scale is None:
        global_scale = global_scale_of(torch.maximum(x.amax(), -x.amin()) if x.numel() else x.new_zeros(()))
    if fmt.granularity in ("tensor", "block") or x.numel() == 0:
        require_finite(x, name)
        scale, zero_point = choose_qparams(x, fmt, scale_dtype, global_scale)
        return QuantizedTensor(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt, global_scale)
    quantized = _quantize_tiles(x, fmt, scale_dtype, global_scale)
    if (
        not x.is_meta and not quantized.scale.isfinite().all()
    ):  # NaN and infinity reach the extremes of their tile
        require_finite(x, name)
    return quantized


def _quantize_tiles(
    x: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype, global_scale: Tensor | None
) -> QuantizedTensor:
    """`quantize_tensor` for tiles within a row, as many at a time as a cache holds."""
    shape = fmt.scale_shape(x.shape)
    tiles = x.reshape(math.prod(shape), -1)
    by_row = replace(fmt, granularity="channel", group_size=None)
    codes = torch.empty(tiles.shape, dtype=fmt.storage, device=x.device)
    scales = torch.empty(len(tiles), 1, device=x.device)
    zeros = None if fmt.symmetric else torch.empty_like(scales)
    count = len(tiles)
    if x.is_cpu:
        count = max(1, _CHUNK * torch.get_num_threads() // tiles.shape[1])
    buffer = torch.empty(tiles[:count].shape, dtype=torch.float32, device=x.device)
    for start in range(0, len(tiles), count):
        part = slice(start, start + count)
        chunk = buffer[: len(tiles) - start].copy_(tiles[part])
        scales[part], zero = choose_qparams(chunk, by_row, scale_dtype, global_scale)
        if zeros is not None and zero is not None:
            zeros[part] = zero
        codes[part] = _round_(chunk.div_(scales[part]), zero, fmt)
    return QuantizedTensor(
        codes.view(x.shape),
        scales.view(shape),
        None if zeros is None else zeros.view(shape),
        fmt,
        global_scale,
    )
