"""deploy/Containerfile as data: its instructions, and what its build stage copies."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """(``COPY``, its arguments), with continued lines joined."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def copied_sources() -> list[Path]:
    """What is copied from the context, relative to it."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    return [Path(source) for words in copies for source in words[:-1]]


def copy_context(target: Path) -> Path:
    """What the build stage sees, links as links."""
    for source in copied_sources():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target / source, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target / source)
    return target
