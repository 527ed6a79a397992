"""docs/linear.md: its snippets run, and its pictures are those that the script draws."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


def drawing_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_linear", DOCS / "pictures" / "draw_linear.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_snippet_runs_in_order() -> None:
    torch.manual_seed(0)
    page = (DOCS / "linear.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 8
    namespace: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets:
        exec(compile(snippet, "docs/linear.md", "exec"), namespace)


@pytest.mark.parametrize("name", ["layer.svg", "scales.svg", "zero-point.svg", "static-dynamic.svg"])
def test_pictures_are_what_the_script_draws(name: str) -> None:
    script = drawing_script()
    drawn = script.PICTURES[name]()
    ElementTree.fromstring(drawn)
    assert (DOCS / "pictures" / name).read_text() == drawn, "run docs/pictures/draw_linear.py"
    assert f"pictures/{name}" in (DOCS / "linear.md").read_text()
