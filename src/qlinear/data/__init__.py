"""Calibration and evaluation text, from wherever it is, as token ids of equal length.

Two steps with a list of documents between them: `load_texts` reads a source, `tokenize` cuts its tokens into full
sequences. `token_ids` is both, with the checks, for every kind of source. A document is a text, or a conversation:
a list of {"role", "content"} messages that the tokenizer's chat template turns into text.
"""

from .sources import Document, load_texts
from .tokens import Source, check_length, load_tokenizer, random_ids, token_ids, tokenize

__all__ = [
    "Document",
    "Source",
    "check_length",
    "load_texts",
    "load_tokenizer",
    "random_ids",
    "token_ids",
    "tokenize",
]
