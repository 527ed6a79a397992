"""Turns documents into token ids of equal length.

Documents are concatenated, and the stream is cut into full sequences. Nothing is padded, so padding cannot enter a
statistic, and no attention mask is needed.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataError
from .sources import Conversation, Document, is_conversation, load_texts, one_line

if TYPE_CHECKING:  # importing transformers takes seconds, and random ids and tensors do not need it
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Source = str | Path | Tensor | Iterable[Document]


def token_ids(
    source: Source,
    samples: int,
    seq_len: int,
    *,
    config: "PreTrainedConfig",
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    seed: int | None = 0,
) -> Tensor:
    """Token ids (n, seq_len), int64, from any source; n is at most `samples`, fewer where the text is short.

    source: "random"; a .txt, .jsonl or .parquet file, or a folder of them; a Hub dataset id; documents; or token ids
    (n, any length), which are used as they are, all of them. config: the model's. tokenizer: returns the tokenizer;
    called only where there is text. seed: for the choice of sequences; None takes the first ones in order. Raises
    DataError.
    """
    text_config = config.get_text_config()
    if isinstance(source, Tensor):
        return _checked_ids(source, text_config)
    _require_positive(samples=samples, seq_len=seq_len)
    check_length(config, seq_len)
    if source == "random":
        return random_ids(config, samples, seq_len, seed or 0)
    texts = load_texts(source) if isinstance(source, str | Path) else source
    return _checked_ids(tokenize(texts, tokenizer(), samples, seq_len, seed), text_config)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder. Raises DataError where there is none with a real vocabulary."""
    from transformers import AutoTokenizer

    mend = "put the tokenizer's files there, or calibrate on 'random' or on token ids"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"no tokenizer can be loaded from {folder}: {one_line(error)}; {mend}") from None
    # Without a tokenizer file, transformers may return a tokenizer that has only special tokens.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise DataError(f"no tokenizer in {folder}: {mend}")
    return tokenizer


def tokenize(
    texts: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seq_len: int,
    seed: int | None = 0,
) -> Tensor:
    """Full sequences (n, seq_len), int64, of the concatenated documents; n is at most `samples`.

    Every document has the special tokens that the tokenizer adds, such as BOS. With a seed, documents are shuffled, as
    many as needed are tokenized, and sequences are drawn from them. With None, the first sequences are taken in order.
    Too little text gives fewer sequences than asked for. Raises DataError for no text, for less than one sequence, and
    for conversations where the tokenizer has no chat template.
    """
    _require_positive(samples=samples, seq_len=seq_len)
    documents, draw = list(texts), random.Random(seed)
    if not documents:
        raise DataError("there is no text: the source is empty")
    if seed is not None:
        draw.shuffle(documents)
    stream: list[int] = []
    for document in documents:
        stream += _encode(document, tokenizer)
        if len(stream) >= samples * seq_len:
            break
    rows = len(stream) // seq_len
    if not rows:
        raise DataError(
            f"the text has {len(stream)} tokens, fewer than seq_len {seq_len}: give more text or shorter sequences"
        )
    chosen = list(range(min(samples, rows)))
    if seed is not None:
        chosen = sorted(draw.sample(range(rows), len(chosen)))
    return torch.tensor(stream[: rows * seq_len]).view(rows, seq_len)[chosen]


def _encode(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of one document. A chat template writes the special tokens itself, so none are added."""
    if isinstance(document, str):
        ids: list[int] = tokenizer(document, verbose=False)["input_ids"]
        return ids
    if not is_conversation(document):
        raise DataError(
            f"a document must be a text or a list of messages, got {type(document).__name__}: token ids are "
            "given as a LongTensor (n, seq_len)"
        )
    ids = tokenizer(_as_text(document, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _as_text(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "the text has `messages`, but the tokenizer has no chat template: give `text` instead"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template([dict(m) for m in conversation], tokenize=False))
    except TemplateError as error:
        raise DataError(f"the chat template refuses a conversation: {one_line(error)}") from None


def random_ids(config: "PreTrainedConfig", samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """Uniformly random token ids (samples, seq_len), int64, for experiments that need no text.

    Ids that the config names (padding, image placeholders, ...) are excluded, because models treat them specially.
    """
    special = {value for key, value in _flat(config.to_dict()) if re.search("token_(id|index)$", key)}
    allowed = [i for i in range(config.get_text_config().vocab_size) if i not in special]
    if not allowed:
        raise DataError(
            "the vocabulary has no ordinary tokens to draw random ids from: give text or token ids"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(allowed)[torch.randint(len(allowed), (samples, seq_len), generator=generator)]


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, integer) pairs of a config and its nested configs; a list gives one pair per element."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int):
                yield key, item


# The config itself resolves other names, such as n_positions, to these.
_LIMITS = ("max_position_embeddings", "max_seq_len")


def check_length(config: "PreTrainedConfig", seq_len: int) -> None:
    """Raise DataError if sequences are longer than the positions that the model was made for."""
    for name, limit in _limits(config).items():
        if limit < seq_len:
            raise DataError(
                f"seq_len {seq_len} is longer than the model takes ({name} {limit}): use at most {limit}"
            )


def most_positions(config: "PreTrainedConfig") -> int | None:
    """The longest sequence that the model was made for; None where its config does not say."""
    return min(_limits(config).values(), default=None)


def _limits(config: "PreTrainedConfig") -> dict[str, int]:
    limits = {name: getattr(config.get_text_config(), name, None) for name in _LIMITS}
    return {name: limit for name, limit in limits.items() if isinstance(limit, int) and limit > 0}


def _checked_ids(ids: Tensor, config: "PreTrainedConfig") -> Tensor:
    """Token ids as int64. Raises DataError unless they are (n, seq_len), in the model's vocabulary and length."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(
            f"token ids must be an integer tensor (n, seq_len), n and seq_len at least 1; got {tuple(ids.shape)} "
            f"{ids.dtype}"
        )
    check_length(config, ids.shape[1])
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise DataError(
            f"token ids must be in 0 ... {config.vocab_size - 1}, the model's vocabulary; got {low} ... {high}: "
            "is the tokenizer another model's?"
        )
    return ids.long()


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1; got {value}")
