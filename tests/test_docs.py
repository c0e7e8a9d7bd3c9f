"""The documents point at what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP_LEVEL = ("parallel/", "runtime/", "proto/", "deploy/", "tests/", "benchmarks/", "docs/")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    quoted = [path for path in re.findall(r"`([\w./-]+)`", text) if path.startswith(TOP_LEVEL)]
    links = list(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    missing = [path for path in quoted if not (ROOT / path).exists()]
    missing += [path for path in links if not (document.parent / path).exists()]
    assert missing == []


def test_every_command_of_the_makefile_is_in_its_help() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    explained = set(re.findall(r"make ([\w-]+) ", makefile))
    assert set(targets.split()) - explained == {"help", "clean"}


def test_the_family_that_is_shown_is_the_one_that_runs() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert (ROOT / "runtime/model/families/nemotron.py").read_text(encoding="utf-8") in shown
