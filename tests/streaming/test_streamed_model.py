"""Only the parts of a model that are in use are in memory."""

from pathlib import Path

import pytest
import torch

import qlinear
from qlinear.checkpoint.reader import Checkpoint
from qlinear.streaming.lanes import batches_of
from qlinear.streaming.streamed_model import StreamedModel

from ..support.models import save_model


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_embeddings_leave_memory_and_are_read_again_where_they_are_called(
    tmp_path: Path, tied: bool
) -> None:
    source = StreamedModel(Checkpoint.open(save_model(tmp_path, "llama", tie_word_embeddings=tied)))
    ids = torch.arange(3, 17).reshape(2, 7)
    table = source.model.get_input_embeddings()
    with torch.no_grad(), source.lanes(batches_of(ids, 1)) as lanes:
        assert table.weight.is_meta
        hidden = torch.cat([lane.waiting.args[0] for lane in lanes])
        assert torch.equal(table(ids), hidden)
    assert table.weight.is_meta
    stored = source.checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(hidden, stored[ids].to(hidden.dtype))


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "qlinear"])
def test_blocks_of_packed_codes_are_read_ahead_too(tmp_path: Path, format: str) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
    source, scheme = save_model(tmp_path / "source", **shape), "w4a16-asym" if format == "awq" else "w4a16"
    qlinear.quantize(source, tmp_path / "out", scheme, smooth="off", format=format)
    cost = qlinear.evaluate(tmp_path / "out", source, data="random", tokens=40, seq_len=20)
    assert cost.kl is not None
