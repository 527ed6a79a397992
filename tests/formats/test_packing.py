"""Packing loses nothing, and words are those of the layouts' own packages."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlinear.formats.packing import pack_awq, pack_words, unpack_awq, unpack_words

SHAPES = st.lists(st.integers(1, 5), max_size=2)


def random_codes(shape: list[int], bits: int, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(SHAPES, st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 9))
def test_unpack_after_pack_is_the_identity(shape: list[int], n: int, bits: int, seed: int) -> None:
    codes = random_codes([*shape, n], bits, seed)
    words = pack_words(codes, bits)
    assert words.shape == (*shape, -(-n * bits // 32))
    assert torch.equal(unpack_words(words, bits, n), codes)


@given(SHAPES, st.integers(1, 9), st.integers(0, 9))
def test_unpack_after_pack_is_the_identity_for_awq(shape: list[int], words: int, seed: int) -> None:
    codes = random_codes([*shape, 8 * words], 4, seed)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [8, 32, 33, 70])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes([6, columns], bits)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(pack_words(codes.T, bits).T, pack_to_int32(codes, bits, packed_dim=0))


def test_awq_words_are_those_of_its_reference() -> None:
    codes = random_codes([3, 16], 4)
    expected = torch.zeros(3, 2, dtype=torch.int64)  # AutoAWQ's WQLinear_GEMM.from_linear, transcribed
    for column in range(2):
        for i, element in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            expected[:, column] |= (codes[:, column * 8 + element].long() + 8) << (i * 4)
    assert torch.equal(pack_awq(codes).long() & 0xFFFFFFFF, expected)
