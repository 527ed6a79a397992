"""Calibration and evaluation text from files, the Hub or Python, as token ids of equal length.

Two steps: `load_texts` reads a source into a list of documents; `tokenize` cuts their tokens into full sequences.
`token_ids` does both, with all checks, for every kind of source. A document is a text, or a conversation: a list of
{"role", "content"} messages, which the tokenizer's chat template renders as text.
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
