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
from .rows import Messages, document, is_conversation
from .sources import Document, load_texts, one_line

if TYPE_CHECKING:  # importing transformers takes seconds, and random ids and tensors do not need it
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Files and ids by name, token ids in whatever holds them, or documents, rows and ids one by one.
Source = str | Path | Tensor | Mapping[str, Any] | Iterable[Document | Mapping[str, Any]]
# What the code in a chat template may raise for a conversation that it does not expect.
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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

    source: "random"; a .txt, .json, .jsonl or .parquet file, or a folder of them; a Hub dataset id; documents or rows;
    or token ids (n, any length), all used as they are, in a tensor, an array, lists or a mapping with `input_ids`.
    config: the model's. tokenizer: returns the tokenizer;
    called only where there is text. seed: for the choice of sequences; None takes the first ones in order. Raises
    DataError.
    """
    text_config = config.get_text_config()
    given = None if isinstance(source, str | Path) else given_ids(source)
    if given is not None:
        return _checked_ids(given, text_config)
    _require_positive(samples=samples, seq_len=seq_len)
    check_length(config, seq_len)
    if isinstance(source, str) and source == "random":
        return random_ids(config, samples, seq_len, seed or 0)
    texts = load_texts(source) if isinstance(source, str | Path) else _documents(source)
    return _checked_ids(tokenize(texts, tokenizer(), samples, seq_len, seed), text_config)


def _documents(source: Any) -> Iterable[Any]:
    """What a source from Python holds: itself where it is a row, the texts of a column, or its elements."""
    if isinstance(source, Mapping):
        column = source.get("text")
        return column if isinstance(column, list | tuple) else [source]
    if not isinstance(source, Iterable):
        raise DataError(f"calibration text must be a file, texts or token ids; got {type(source).__name__}")
    return source


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder. Raises DataError where there is none with a real vocabulary."""
    from transformers import AutoTokenizer

    mend = "put the tokenizer's files there, or calibrate on 'random' or on token ids"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # which is what the tokenizers library itself raises for a damaged file
        raise DataError(f"no tokenizer can be loaded from {folder}: {one_line(error)}; {mend}") from None
    # Without a tokenizer file, transformers may return a tokenizer that has only special tokens.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise DataError(f"no tokenizer in {folder}: {mend}")
    return tokenizer


def tokenize(
    texts: Iterable[Any],
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
    documents, draw = list(enumerate(texts, 1)), random.Random(seed)
    if not documents:
        raise DataError("there is no text: the source is empty")
    if seed is not None:
        draw.shuffle(documents)
    stream: list[int] = []
    for number, item in documents:
        stream += _encode(item, tokenizer, f"document {number}")
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


def _encode(item: Any, tokenizer: "PreTrainedTokenizerBase", place: str) -> list[int]:
    """The token ids of one document, row or list of ids. A chat template writes the special tokens itself."""
    if isinstance(item, Mapping) and "input_ids" not in item:
        item = document(item, place)
    if isinstance(item, Messages) and item.plain and getattr(tokenizer, "chat_template", None) is None:
        item = item.plain
    if isinstance(item, str):
        return _ids_of(item, tokenizer, True)
    if is_conversation(item):
        text = _as_text(item if isinstance(item, Messages) else Messages(item, place), tokenizer)
        return _ids_of(text, tokenizer, False)
    given = given_ids(item, place)
    if given is None or given.is_floating_point() or given.dtype == torch.bool:
        raise DataError(
            f"{place} must be a text or a list of messages, got {type(item).__name__}: token ids are given as a "
            "LongTensor (n, seq_len)"
        )
    return given.flatten().tolist()


def _ids_of(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool) -> list[int]:
    """The token ids of a text. special: whether the tokenizer adds its special tokens. Raises DataError."""
    try:
        ids: list[int] = tokenizer(_well_formed(text), add_special_tokens=special, verbose=False)["input_ids"]
    except _TEMPLATE_ERRORS as error:
        raise DataError(f"the tokenizer cannot be used: {one_line(error)}: mend its files") from None
    return ids


def _well_formed(text: str) -> str:
    """The text with surrogates that have no partner, which no UTF-8 can hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def given_ids(source: Any, place: str = "the token ids") -> Tensor | None:
    """Token ids that are given as such, whatever holds them; None where it is something else.

    A tensor, an array, a (nested) list of integers, or a mapping such as a `BatchEncoding` with them as `input_ids`.
    Raises DataError for padding, and for lists of different lengths.
    """
    mask = None
    if isinstance(source, Mapping):
        if "input_ids" not in source:
            return None
        source, mask = source["input_ids"], source.get("attention_mask")
    if not isinstance(source, Tensor):
        is_array = hasattr(source, "__array__")
        nested = isinstance(source, list | tuple) and source and isinstance(_first(source), int)
        if not (is_array or nested):
            return None
        try:
            source = torch.as_tensor(source)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{place} cannot be made a tensor ({one_line(error)}): give equal lengths"
            ) from None
    if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
        raise DataError(
            f"{place} have padding (attention_mask 0), which would enter the statistics: give full sequences"
        )
    return source  # type: ignore[no-any-return]


def _first(values: Any) -> Any:
    while isinstance(values, list | tuple) and values:
        values = values[0]
    return values


def _as_text(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{messages.place}: the text has `messages`, but the tokenizer has no chat template: give `text` instead"
        )
    from jinja2 import TemplateError

    try:
        turns: list[dict[str, Any]] = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tools=messages.tools, tokenize=False))
    except (TemplateError, *_TEMPLATE_ERRORS) as error:
        raise DataError(
            f"{messages.place}: the chat template refuses a conversation: {one_line(error)}"
        ) from None


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
