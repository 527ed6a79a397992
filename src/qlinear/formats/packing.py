"""Small codes to 32-bit words and back, one pair of functions per layout that stores them so.

Nothing is rounded here: unpack(pack(codes)) is codes. Both layouts store a signed code as code + 2^(bits-1),
so that words hold plain unsigned fields, the first in the least significant bits.

    pack_words   compressed-tensors   fields in order, along the last dimension, the last word padded with zeros
    pack_awq     AWQ, GEMM version    eight 4-bit fields of a word in the order 0 2 4 6 1 3 5 7
"""

import torch
from torch import Tensor

# Field i of a word holds element AWQ_ORDER[i]: AWQ's kernel takes out even and odd halves with one mask each.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Words of signed codes: int8 (*, n), each in -2^(bits-1) ... 2^(bits-1)-1, to int32 (*, ceil(n·bits/32)).

    bits: 4 or 8. Element i of a row takes bits 4i (8i) and up of its row's words.
    """
    fields = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return _to_words(torch.nn.functional.pad(fields, (0, -codes.shape[-1] % (32 // bits))), bits)


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Codes from words: the inverse of `pack_words`, int32 (*, w) to int8 (*, n)."""
    fields = _to_fields(words, bits)[..., :n]
    return (fields.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def pack_awq(codes: Tensor) -> Tensor:
    """AWQ words of signed 4-bit codes: int8 (*, n), n a multiple of 8, each in -8 ... 7, to int32 (*, n/8)."""
    fields = (codes + 8).to(torch.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    return _to_words(fields[..., list(AWQ_ORDER)].flatten(-2), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """Codes from AWQ words: the inverse of `pack_awq`, int32 (*, w) to int8 (*, 8w)."""
    fields = _to_fields(words, 4).view(*words.shape, 8)
    place = [AWQ_ORDER.index(element) for element in range(8)]
    codes: Tensor = fields[..., place].flatten(-2).to(torch.int8)
    return codes - 8


def _to_words(fields: Tensor, bits: int) -> Tensor:
    """uint8 fields (*, n), n filling whole words, to int32; bytes of a word are little-endian, as torch's are."""
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << 4)
    # Flattened first: a transposed row counts as contiguous whatever its strides, and view minds strides.
    return fields.reshape(-1).view(torch.int32).view(*fields.shape[:-1], fields.shape[-1] // 4)


def _to_fields(words: Tensor, bits: int) -> Tensor:
    """uint8 fields of int32 words."""
    fields = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * 4)
    return torch.stack((fields & 15, fields >> 4), dim=-1).flatten(-2) if bits == 4 else fields
