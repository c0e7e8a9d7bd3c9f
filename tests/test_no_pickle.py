"""No link of ours carries pickled objects: whoever reads a message can be told nothing but data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("parallel", "runtime") for path in (ROOT / folder).rglob("*.py"))
PICKLERS = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "multiprocessing")
# torch's own ways to write objects: files, collectives of objects, calls to other processes.
UNPICKLING = ("torch.save", "torch.load", "torch.distributed.rpc", "numpy.load", "np.load")


def picklers_of(source: str) -> Iterator[str]:
    """What ``source`` uses that pickles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            yield from (name for name in names if name.partition(".")[0] in PICKLERS or name.startswith(UNPICKLING))
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in UNPICKLING or node.attr in ("gather_object", "all_gather_object") or "_object_list" in node.attr:
                yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_a_file_pickles(path: Path) -> None:
    assert list(picklers_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "import ray.cloudpickle, cloudpickle",
        "from multiprocessing.connection import Listener",
        "torch.save(x, file)",
        "from torch import load",
        "torch.distributed.all_gather_object(out, x)",
        "dist.broadcast_object_list([x])",
    ],
)
def test_what_pickles_is_found(source: str) -> None:
    assert len(list(picklers_of(source))) == 1
