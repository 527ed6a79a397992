"""What the documents say to type works: their Python and their commands are run, in order, where a reader would.

Blocks marked `python` and `sh` are run; `console` marks what is not (an engine that is not installed here, `make`).
A reader's own files are copies of the embedded ones: the model, and the beginnings of the texts, so that this is quick.
"""

import json
import re
import shlex
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlinear import demo
from qlinear.cli.commands import app

ROOT = Path(__file__).parents[2]
RUN = ("README.md", "docs/guide.md", "docs/serve-transformers.md")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Wrapped prose; a table, a code block or a list of changes may run on.
WIDTH = 112

CHARACTERS = 12_000  # of a text of one's own

BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)(?P<target>[^)#]+)(#[^)]*)?\)")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text of one's own, where commands are typed."""
    shutil.copytree(demo.checkpoint_path(), tmp_path / "my-model")
    write_text(tmp_path / "my-text.jsonl", demo.calibration_text())
    write_text(tmp_path / "held-out.jsonl", demo.evaluation_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_text(file: Path, documents: list[str]) -> None:
    """Of documents together long enough for a few sequences, a line each."""
    ends = accumulate(len(document) for document in documents)
    chosen = [document for document, end in zip(documents, ends, strict=True) if end < CHARACTERS]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in chosen))


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN)
def test_what_a_document_says_to_type_works(document: str, reader: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "snippet"}
    blocks = [match.groupdict() for match in BLOCK.finditer((ROOT / document).read_text())]
    runnable = [block for block in blocks if block["language"] in ("python", "sh")]
    assert runnable
    for block in runnable:
        if block["language"] == "python":
            exec(compile(block["code"], document, "exec"), namespace)
        else:
            type_commands(block["code"])


def type_commands(block: str) -> None:
    """Each line is a `qlinear` command; a backslash at its end continues it."""
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or ["", ""]
        if program:
            assert program == "qlinear", f"only qlinear commands are run; got {line!r}"
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(document: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(document.read_text())]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.parent.name == "docs"], ids=lambda p: p.name)
def test_prose_is_wrapped(document: Path) -> None:
    prose = BLOCK.sub("", document.read_text())
    long = [line for line in prose.splitlines() if len(line) > WIDTH and not line.startswith(("|", "    "))]
    assert not long


def test_the_page_that_explains_the_code_names_files_and_folders_that_exist() -> None:
    page, source = (ROOT / "docs" / "how-it-works.md").read_text(), ROOT / "src" / "qlinear"
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page)
    assert [
        name for name in named if not (source / name).exists() and not list(source.glob(f"*/{name}"))
    ] == []
    folders = {f"{folder.name}/" for folder in source.iterdir() if (folder / "__init__.py").is_file()}
    assert folders <= set(named)
