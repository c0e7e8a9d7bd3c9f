"""Imports go one way, each outside library has one home, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_models import save_llama

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 350

# What each part may import of ours, besides itself. Deeper parts stand first.
ALLOWED = {
    "parallel": (),
    "v1": (),
    "runtime.config": (),
    "runtime.model": ("parallel", "runtime.config"),
    "runtime.engine": ("parallel", "runtime.config", "runtime.model"),
    "runtime.cluster": ("parallel", "runtime.config", "runtime.model", "runtime.engine"),
    "runtime.driver": ("parallel", "runtime.config", "runtime.model", "runtime.engine", "runtime.cluster"),
    "runtime.observe": ("__version__", *(f"runtime.{part}" for part in ("config", "engine", "driver"))),
    "runtime.server": (
        "v1",
        "parallel.tls",
        "__version__",
        *(f"runtime.{part}" for part in ("config", "model", "engine", "cluster", "driver", "observe")),
    ),
    "runtime.deploy": ("__version__", "parallel", *(f"runtime.{part}" for part in ("config", "model", "engine"))),
    "runtime.client": ("runtime.engine.request", "v1"),
    "runtime.serve": tuple(
        f"runtime.{part}" for part in ("config", "model", "engine", "cluster", "driver", "observe", "server")
    ),
    "runtime.cli": ("runtime", "v1", "__version__"),
    "__main__": ("runtime.cli",),
    "__init__": ("runtime",),
}

# Where an outside library may be imported; every other place is refused.
HOMES = {
    "ray": ("runtime.cluster",),
    "torch.distributed": ("parallel",),
    "triton": ("parallel.kernels", "runtime.model.kernels"),
    "opentelemetry": ("runtime.observe.tracer", "runtime.observe.step_spans"),
    "smg_grpc_proto": ("runtime.server.gateway",),
    "prometheus_client": ("runtime.observe.collector", "runtime.observe.port"),
    **dict.fromkeys(
        ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google.rpc"),
        ("runtime.server", "runtime.client", "v1"),
    ),
}

PURE = tuple(f"runtime.engine.{name}" for name in ("scheduler", "pages", "request", "step"))
LIGHT = (*PURE, "runtime.cluster.leader")  # stub engines behind a real leader start by the hundred
NEVER_IN_LIGHT = ("torch", "ray", "grpc")
BARE = ("runtime", "parallel", "deploy", "proto")


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported_modules(source: str) -> Iterator[str]:
    """Every module that the source names, also inside functions, and ``torch.distributed`` used as an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def part_of(module: str) -> str:
    """The longest key of ALLOWED that holds ``module``."""
    parts = [part for part in ALLOWED if is_within(module, part)]
    return max(parts, key=len) if parts else "none"


def violations(module: str, source: str) -> list[str]:
    """What ``source`` imports against the rules, if it stood at ``shardray.<module>``."""
    part = part_of(module)
    found = []
    for name in imported_modules(source):
        if name.startswith(".") or any(is_within(name, bare) for bare in BARE):
            found.append(f"{module}: imports {name}; write shardray.…")
        if is_within(name, "shardray"):
            target = name.removeprefix("shardray").removeprefix(".")
            allowed = (part, *ALLOWED.get(part, ()))
            if not any(is_within(target, prefix) for prefix in allowed):
                found.append(f"{module}: imports {name}; {part} may import {', '.join(allowed)}")
        for library, homes in HOMES.items():
            if is_within(name, library) and not any(is_within(module, home) for home in homes):
                found.append(f"{module}: imports {name}; only {', '.join(homes)} may")
        if module in PURE and any(is_within(name, library) for library in NEVER_IN_LIGHT):
            found.append(f"{module}: imports {name}; it has to stay free of {', '.join(NEVER_IN_LIGHT)}")
    return found


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "shardray" else relative.parts
    return ".".join(parts).removesuffix(".__init__") if parts != ("__init__",) else "__init__"


def source_files() -> list[Path]:
    folders = [ROOT / "parallel", ROOT / "runtime", ROOT / "benchmarks"]
    nested = [path for folder in folders for path in folder.rglob("*.py") if ".peers" not in path.parts]
    return sorted([*nested, *(ROOT / "shardray").glob("*.py"), *(ROOT / "proto").glob("*.py")])


PACKAGE_FILES = [path for path in source_files() if path.relative_to(ROOT).parts[0] not in ("benchmarks", "proto")]


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_idea(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{num_lines} lines: a concept is missing"


def test_no_generic_module_name_is_imported_anywhere() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    for path in [*source_files(), *tests]:
        for name in imported_modules(path.read_text(encoding="utf-8")):
            assert not any(is_within(name, bare) for bare in BARE), f"{path} imports {name}"


@pytest.mark.parametrize("module", LIGHT)
def test_planning_and_the_links_load_no_heavy_library_even_indirectly(module: str) -> None:
    assert loaded_by(f"import shardray.{module}", NEVER_IN_LIGHT) == "[]"


def test_a_driver_loads_no_torch_for_all_that_it_asks_of_a_model(tmp_path: Path) -> None:
    """It would take a second of every start."""
    save_llama(tmp_path)
    script = f"""
import shardray.runtime.cli.watchers
from shardray.runtime.cluster.form import MeshRecipe
from shardray.runtime.cluster.shapes import smaller_recipes
from shardray.runtime.config import load_config
from shardray.runtime.driver.fit import needed_bytes
from shardray.runtime.model.sources import resolve_model
config = load_config(None, ["model.source={tmp_path}", "parallel.tensor_parallel_size=2"])
recipe = MeshRecipe(config, str(resolve_model(config.model.source)))
assert len(needed_bytes(recipe, {{"cpu"}})) == 2 and smaller_recipes(recipe)
"""
    assert loaded_by(script, ("torch", "numba", "gguf", "transformers")) == "[]"


def loaded_by(script: str, names: tuple[str, ...]) -> str:
    """Those of ``names`` that a process has imported after ``script``."""
    check = f"{script}\nimport sys\nprint([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("parallel.plan", "from shardray.runtime.config import Config"),
        ("parallel.plan", "import runtime.config"),
        ("parallel.plan", "from . import mesh"),
        ("runtime.model.spec", "from shardray.runtime.engine.request import EngineRequest"),
        ("runtime.driver.link", "import grpc"),
        ("runtime.engine.loop", "import ray"),
        ("runtime.engine.loop", "def late():\n    from shardray.runtime.cluster import form"),
        ("runtime.engine.loop", "import torch\n\ntorch.distributed.barrier()"),
        ("runtime.engine.loop", "from torch import distributed"),
        ("runtime.engine.scheduler", "from torch import Tensor"),
        ("runtime.driver.router", "import grpc.aio"),
        ("runtime.driver.router", "from shardray.runtime.server.assembly import Server"),
        ("runtime.cluster.hosts", "from grpc import aio"),
        ("runtime.client", "from shardray.runtime.driver.router import Router"),
        ("runtime.serve", "from shardray.runtime.cli import main"),
        ("runtime.unheard_of", "from shardray.parallel.plan import ShardPlan"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("parallel.mesh", "import torch.distributed as dist"),
        ("runtime.cluster.host", "import ray\nfrom shardray.runtime.engine.shard import form_shard"),
        ("runtime.client.aio", "import grpc.aio"),
        ("runtime.server.health", "from grpc_health.v1 import health_pb2"),
        ("runtime.engine.shard", "import torch\nfrom shardray.parallel.mesh import Mesh"),
        ("runtime.engine.scheduler", "from shardray.runtime.engine.pages import PageTable"),
        ("runtime.cli.app", "from shardray import __version__"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
