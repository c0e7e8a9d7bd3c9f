"""sdist and wheel, built from what the container's build stage copies: they hold what is needed, as ordinary files."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from shardray import __version__
from tests.deploy.containerfile import ROOT, copy_context

NEEDED = (
    "shardray/__init__.py",
    "shardray/py.typed",
    "shardray/parallel/plan.py",
    "shardray/runtime/serve.py",
    "shardray/runtime/deploy/kuberay.py",
    "shardray/runtime/observe/page/index.html",
    "shardray/v1/inference.proto",
    "shardray/v1/inference_pb2.pyi",
    "shardray/deploy/examples/cpu-demo.yaml",
    "shardray/deploy/grafana/shardray.json",
    "shardray/deploy/kuberay/shardray-cpu.yaml",
    "shardray/deploy/systemd/shardray.service",
)
BESIDE = ("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel is built from the sdist: what the sdist lacks, the wheel lacks."""
    context = copy_context(tmp_path_factory.mktemp("context"))
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", str(target), str(context)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_holds_what_is_needed_and_nothing_of_the_tests(packages: Path) -> None:
    with zipfile.ZipFile(packages / f"shardray-{__version__}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        links = [entry.filename for entry in wheel.infolist() if stat.S_ISLNK(entry.external_attr >> 16)]
    assert set(NEEDED) <= names
    assert links == []
    assert {name.partition("/")[0] for name in names} == {"shardray", f"shardray-{__version__}.dist-info"}
    assert not any("__pycache__" in name for name in names)


def test_the_sdist_holds_the_sources_and_what_explains_them(packages: Path) -> None:
    with tarfile.open(packages / f"shardray-{__version__}.tar.gz") as sdist:
        members = sdist.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert {*NEEDED, *BESIDE} <= names
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    assert not any(name.startswith("tests/") for name in names)


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "shardray.__version__"}
    source = (ROOT / "shardray" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [__version__]


def test_the_newest_changes_are_those_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
