"""Numbers to codes and back: the only place in qlinear that rounds.

A tensor is seen as tiles that share a scale (`TensorFormat.tile`). Weights are rounded a few tiles at a time, in one
small buffer: a float32 copy of a whole weight would be read from and written to main memory seven times over, and on
the machines this runs on a fresh page costs more than the arithmetic done on it.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NumericsError
from .scheme import TensorFormat

# Elements of a float32 working copy that stay in a core's cache.
_CHUNK = 1 << 17
_TINY = torch.finfo(torch.float32).tiny
# Infinity's bits, in the dtypes that torch adds up slowly.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def count_bad(x: Tensor) -> int:
    """How many elements are NaN or infinite; where none is, one pass over x."""
    if not x.is_floating_point() or x.numel() == 0 or _is_finite(x):
        return 0
    return int((~torch.isfinite(x)).sum())


def _is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite; may say no where large finite numbers add up to infinity."""
    infinity = _INFINITY.get(x.dtype)
    if infinity is None:
        return bool(torch.isfinite(x.sum(dtype=torch.float32)))
    # The bits of magnitudes are in the order of the magnitudes, NaN above infinity; adding up is several times slower.
    parts = torch.split(x.view(torch.int16).reshape(-1), _CHUNK)
    return all(int((part & 0x7FFF).amax()) < infinity for part in parts)


def require_finite(x: Tensor, name: str, hint: str = "") -> None:
    """Raise NumericsError, naming the tensor and counting the elements, if `x` holds NaN or infinity."""
    bad = 0 if x.is_meta else count_bad(x)
    if bad:
        raise NumericsError(f"{name} holds {bad} NaN or infinite of {x.numel()} elements{hint}")


def _tiles(x: Tensor, fmt: TensorFormat) -> tuple[Tensor, tuple[int, ...]]:
    """`x` padded and viewed as (..., row tiles, rows, column tiles, columns); the dims that share a scale."""
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
    """A scale or zero point, shaped to broadcast against (or match) a tensor of `shape`."""
    if fmt.granularity in ("tensor", "channel", "token"):
        return scale
    rows, columns = fmt.tile(shape)
    spread = scale.repeat_interleave(columns, -1)[..., : shape[-1]]
    return spread.repeat_interleave(rows, -2)[..., : shape[-2], :] if rows > 1 else spread


def choose_qparams(
    x: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a tensor, from its extremes.

    x: (*, in), any float dtype. Returns scale (`fmt.scale_shape(x.shape)`, float32, rounded to `scale_dtype`) and
    zero_point (same shape, float32 holding integers), None if symmetric. An all-zero tile, or one whose scale
    would underflow, gets scale 1, so its codes are 0 and nothing divides by zero.

    Symmetric: scale = absmax / steps. Asymmetric (Jacob et al. 2018, eq. 1-3): the range is widened to contain 0,
    scale = (max - min) / (2^b - 1), zero_point = clamp(round(low - min / scale), low, high).
    """
    if x.numel() == 0:
        ones = torch.ones(fmt.scale_shape(x.shape), dtype=torch.float32, device=x.device)
        return ones, None if fmt.symmetric else torch.zeros_like(ones)
    tiles, dims = _tiles(x, fmt)
    low, high = tiles.amin(dims).float(), tiles.amax(dims).float()
    return qparams_from_range(low, high, fmt, scale_dtype)


def qparams_from_range(
    low: Tensor, high: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point from the least and greatest value of each tile (float32, the scale's shape)."""
    if fmt.symmetric:
        return scale_from_absmax(torch.maximum(high, -low), fmt, scale_dtype), None
    first, last = fmt.code_range
    low, high = low.clamp(max=0), high.clamp(min=0)
    # Each end is divided on its own: high - low may overflow where both are finite.
    scale = _nonzero(high / (last - first) - low / (last - first), scale_dtype)
    return scale, (first - low / scale).round().clamp(first, last)


def scale_from_absmax(absmax: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The symmetric scale, absmax / steps, of each tile (float32, the shape of `absmax`)."""
    return _nonzero(absmax / fmt.steps, scale_dtype)


def _nonzero(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """`scale` as it will be stored, and 1 where it is zero there (or no more than float32 arithmetic keeps)."""
    stored = scale if scale_dtype == scale.dtype else scale.to(scale_dtype).float()
    return torch.threshold(stored, _TINY, 1.0)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Codes of `x` (its shape, `fmt.storage`): clamp(round(x / scale) + zero_point), half to even.

    Raises nothing for NaN: callers check inputs with `require_finite`, which can name the tensor.
    """
    zero = None if zero_point is None else per_element(zero_point, fmt, x.shape)
    return _round_(x.float() / per_element(scale, fmt, x.shape), zero, fmt).to(fmt.storage)


def _round_(scaled: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """What has been divided by its scale becomes codes, in place."""
    if not fmt.is_float:
        scaled.round_()
    if zero_point is not None:
        scaled += zero_point
    return scaled.clamp_(*fmt.code_range)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """(codes - zero_point) * scale in float32, the shape of `codes`."""
    x = codes.float()
    if zero_point is not None:
        x -= per_element(zero_point, fmt, codes.shape).float()
    return x.mul_(per_element(scale, fmt, codes.shape))


def nearest_values(x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """`dequantize` of `quantize` for float32 x, its scales such as broadcast against it: for searches, which keep no
    codes."""
    return nearest_steps_(x / scale, zero_point, fmt).mul_(scale)


def nearest_steps_(scaled: Tensor, zero_point: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Float32 that has been divided by its scale becomes the nearest that codes stand for, in place: codes less their
    zero point, which broadcasts against them."""
    if fmt.is_float:
        return scaled.copy_(scaled.clamp_(*fmt.code_range).to(fmt.storage))
    scaled.round_()
    if zero_point is None:
        return scaled.clamp_(*fmt.code_range)
    return scaled.add_(zero_point).clamp_(*fmt.code_range).sub_(zero_point)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes with what is needed to read them: what every algorithm returns and every layout writes.

    codes: (..., out, in), `format.storage`. scale: `format.scale_shape(codes.shape)`, float32.
    zero_point: the scale's shape, float32 holding integers, None if symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: TensorFormat

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, float32."""
        return dequantize(self.codes, self.scale, self.zero_point, self.format)


def quantize_tensor(
    x: Tensor, fmt: TensorFormat, name: str = "weight", scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Round to nearest: the extremes of each tile give its scale.

    x: (..., out, in), any float dtype. Raises NumericsError, with `name`, on NaN or infinity, and SchemeError
    where the format does not fit the shape.
    """
    if fmt.granularity in ("tensor", "block") or x.numel() == 0:
        require_finite(x, name)
        scale, zero_point = choose_qparams(x, fmt, scale_dtype)
        return QuantizedTensor(quantize(x, scale, zero_point, fmt), scale, zero_point, fmt)
    made = _quantize_tiles(x, fmt, scale_dtype)
    if not x.is_meta and not made.scale.isfinite().all():  # NaN and infinity reach the extremes of their tile
        require_finite(x, name)
    return made


def _quantize_tiles(x: Tensor, fmt: TensorFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
    """`quantize_tensor` where a tile is a row, or a part of one: as many at a time as a cache holds."""
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
        scales[part], zero = choose_qparams(chunk, by_row, scale_dtype)
        if zeros is not None and zero is not None:
            zeros[part] = zero
        codes[part] = _round_(chunk.div_(scales[part]), zero, fmt)
    return QuantizedTensor(
        codes.view(x.shape), scales.view(shape), None if zeros is None else zeros.view(shape), fmt
    )
