"""Small codes packed into 32-bit words, and unpacked: one pair of functions per layout.

Nothing is rounded here: unpack(pack(codes)) equals codes. Both layouts store a signed code as code + 2^(bits-1), so
words hold unsigned fields, the first in the least significant bits.

    pack_words   compressed-tensors   fields in order, along the last dimension, the last word padded with zeros
    pack_awq     AWQ, GEMM version    eight 4-bit fields of a word in the order 0 2 4 6 1 3 5 7 pack_e2m1
    compressed-tensors   e2m1 values, two in a byte, the first in the low bits; sign bit, exponent, mantissa
"""

import torch
from torch import Tensor

# Field i of a word holds element AWQ_ORDER[i], so that AWQ's kernel reads even and odd halves with one mask each.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes into words.

    codes: int8 (*, n), each in -2^(bits-1) ... 2^(bits-1)-1. bits: 4 or 8. Returns int32 (*, ceil(n·bits/32)); element
    i of a row takes bits 4i (8i) and up of the row's words.
    """
    fields = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return _to_words(torch.nn.functional.pad(fields, (0, -codes.shape[-1] % (32 // bits))), bits)


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Unpack words, int32 (*, w), to codes, int8 (*, n): the inverse of `pack_words`."""
    fields = _to_fields(words, bits)[..., :n]
    return (fields.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def pack_awq(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes, int8 (*, n) in -8 ... 7, n a multiple of 8, into AWQ's words, int32 (*, n/8)."""
    fields = (codes + 8).to(torch.uint8).reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    return _to_words(fields[..., list(AWQ_ORDER)].flatten(-2), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """Unpack AWQ's words, int32 (*, w), to codes, int8 (*, 8w): the inverse of `pack_awq`."""
    fields = _to_fields(words, 4).view(*words.shape, 8)
    place = [AWQ_ORDER.index(element) for element in range(8)]
    codes: Tensor = fields[..., place].flatten(-2).to(torch.int8)
    return codes - 8


def pack_e2m1(codes: Tensor) -> Tensor:
    """Pack e2m1 values, float8_e4m3fn (*, n), n even, into bytes, uint8 (*, n/2)."""
    bits = codes.contiguous().view(torch.uint8)
    size = bits & 0x7F
    # From 1.0 (0x38) on, e4m3's bits without the lower two of its mantissa count as e2m1's do; below are ½ and 0.
    nibbles = torch.where(size >= 0x38, (size >> 2) - 12, (size > 0).to(torch.uint8)) | ((bits >> 4) & 8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Unpack bytes, uint8 (*, w), to e2m1 values, float8_e4m3fn (*, 2w): the inverse of `pack_e2m1`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    size = nibbles & 7
    bits = torch.where(size >= 2, (size + 12) << 2, size * 0x30) | ((nibbles & 8) << 4)
    return bits.view(torch.float8_e4m3fn)


def _to_words(fields: Tensor, bits: int) -> Tensor:
    """uint8 fields (*, n) that fill whole words, to int32; bytes of a word are little-endian, as torch's are."""
    if bits == 4:
        fields = fields[..., 0::2] | (fields[..., 1::2] << 4)
    # Flattened first, because a transposed row counts as contiguous with any strides, and view checks strides.
    return fields.reshape(-1).view(torch.int32).view(*fields.shape[:-1], fields.shape[-1] // 4)


def _to_fields(words: Tensor, bits: int) -> Tensor:
    """uint8 fields of int32 words."""
    fields = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * 4)
    return torch.stack((fields & 15, fields >> 4), dim=-1).flatten(-2) if bits == 4 else fields
