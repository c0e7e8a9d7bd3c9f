"""The systemd unit: systemd reads it, it is closed as far as a fleet allows, and a stop has the time that it needs."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shardray.runtime.config import LimitsSettings

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "shardray.service"
_CLEAN_UP_S = 30
_MOST_EXPOSURE = 3.0  # of 10, as systemd reckons

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to ask")


def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    return unit["Service"]


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False)


@needs_systemd
def test_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    """Its one complaint would be that the program is not installed here."""
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    copy = tmp_path / UNIT.name
    copy.write_text(text, encoding="utf-8")
    done = analyze("verify", str(copy))
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_little_is_left_open() -> None:
    done = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) < _MOST_EXPOSURE


def test_a_stop_asks_the_driver_alone_and_waits_until_it_can_have_drained() -> None:
    settings = service()
    assert (settings["KillMode"], settings["KillSignal"]) == ("mixed", "SIGTERM")
    assert float(settings["TimeoutStopSec"]) >= LimitsSettings().shutdown_grace_s + _CLEAN_UP_S


def test_paths_that_the_documents_name_can_be_written_to_and_read_by_a_gateway() -> None:
    """ProtectSystem=strict leaves the folders that systemd makes for the unit, and those alone."""
    settings = service()
    assert settings["ProtectSystem"] == "strict"
    documents = "".join(path.read_text(encoding="utf-8") for path in (UNIT.parents[2] / "docs").glob("*.md"))
    found = {Path(path) for path in re.findall(r"(?:journal|discovery_file): (/[\w./-]+)", documents)}
    assert Path("/run/shardray/workers.json") in found
    writable = {Path("/var/lib", settings["StateDirectory"]), Path("/run", settings["RuntimeDirectory"])}
    assert {path.parent for path in found} <= writable
    assert settings.get("RuntimeDirectoryMode", "0755") == "0755"


def test_bad_settings_are_not_tried_again_and_again() -> None:
    settings = service()
    assert (settings["Restart"], settings["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_it_runs_a_command_that_there_is() -> None:
    program, command, _ = service()["ExecStart"].split()
    assert (Path(program).name, command) == ("shardray", "serve")
