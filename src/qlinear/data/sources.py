"""Reads files, folders and Hub datasets into a list of documents.

Every kind of source is a generator of rows. A row comes with its place (file and line), which errors name. `rows`
says what a row means.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from .rows import FIELDS, Conversation, document

Document = str | Conversation

# The most rows that are read from a Hub dataset: calibration needs hundreds, and some datasets have billions.
HUB_ROWS = 10_000
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")


def load_texts(source: str | Path) -> list[Document]:
    """The documents of a .txt, .json, .jsonl or .parquet file, of all such files in a folder, or of a Hub dataset.

    A .txt file is one document. A row of the other kinds is one document, in the fields that `rows` lists. A Hub
    dataset is named "owner/name" or "owner/name:config"; the first 10,000 rows of its training split are read. Blank
    texts are skipped. Raises DataError, naming file and line, for anything that cannot be read.
    """
    texts: list[Document] = [
        text for place, row in _rows(source) if not _is_blank(text := document(row, place))
    ]
    if not texts:
        raise DataError(f"{source} holds no text: it is empty or blank")
    return texts


def _rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, row) for every row of a source; errors about the row name the place."""
    path, hub = Path(source), _HUB_ID.fullmatch(str(source))
    if hub and not path.exists() and path.suffix not in _READERS:
        return _hub_rows(hub["id"], hub["config"])
    return chain.from_iterable(_READERS[file.suffix](file) for file in _files(path))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise DataError(f"{path} holds no {_KINDS} file: name a file or a folder that does")
        return files
    if not path.exists():
        raise DataError(
            f"no such file: {path}; name a {_KINDS} file, a folder of them, or a Hub id owner/name"
        )
    if path.suffix not in _READERS:
        raise DataError(f"{path} is of an unknown kind {path.suffix!r}: the kinds read are {_KINDS}")
    return [path]


def _is_blank(document: Document) -> bool:
    return isinstance(document, str) and not document.strip()


def _text_rows(path: Path) -> Iterator[tuple[str, Any]]:
    yield str(path), {"text": _read(path)}


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Lines end at \n alone: str.splitlines would also split at U+2028, which JSON strings may hold.
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({_reason(error)})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of rows, such a list in the only field of an object, a single row, or JSON lines."""
    text = _read(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines of JSON go by this suffix, too
            return _jsonl_rows(path)
        raise DataError(f"{path}, line {error.lineno}: not JSON ({_reason(error)})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({_reason(error)})") from None
    if isinstance(content, Mapping) and not content.keys() & set(FIELDS):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    rows = content if isinstance(content, list) else [content]
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _reason(error: Exception) -> str:
    return (
        f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    arrow = _from_extra("pyarrow", f"reading {path}")
    try:
        file = import_module("pyarrow.parquet").ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} is no parquet file: {one_line(error)}") from None
    with file:
        columns = [name for name in FIELDS if name in file.schema_arrow.names]
        if not columns:
            raise DataError(
                f"{path} has no column `text` or `messages`; its columns: {file.schema_arrow.names}"
            )
        number = 0
        try:
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except (OSError, ValueError, arrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged after row {number}: {one_line(error)}") from None


def _hub_rows(name: str, config: str | None) -> Iterator[tuple[str, Any]]:
    datasets = _from_extra("datasets", f"reading {name} from the Hub")
    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        for number, row in enumerate(islice(rows, HUB_ROWS), 1):
            yield f"{name}, row {number}", row
    except (OSError, ValueError) as error:  # no network, no such dataset, config or split
        raise DataError(
            f"{name} is no file here, and the Hub dataset cannot be read: {one_line(error)}"
        ) from None


# How files become rows, by suffix.
_READERS = {".txt": _text_rows, ".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
_KINDS = ", ".join(_READERS)


def _from_extra(module: str, purpose: str) -> Any:
    """Import a module of the optional extra `data`. Raises DataError, naming the extra, where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        raise DataError(f"{purpose} needs the package {module}: pip install 'qlinear[data]'") from None


def one_line(error: BaseException) -> str:
    """The beginning of another library's message, on one line, to quote in one of ours."""
    return " ".join(str(error).split())[:300]
