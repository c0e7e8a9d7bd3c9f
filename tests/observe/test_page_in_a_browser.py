"""The page in a headless Chromium, where there is one: its script runs, under its policy, and shows the fleet."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shardray.runtime.driver.operations import OperationKind, OperationProgress, OperationStatus
from tests.observe.conftest import Observed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def test_the_page_shows_the_fleet_and_breaks_no_rule_of_its_policy(observed: Observed, tmp_path: Path) -> None:
    observed.generate(max_tokens=20, ignore_eos=True)
    operation = OperationStatus(OperationKind.SCALE, OperationProgress("forming 1 more", 0.8))
    observed.loop.call_soon_threadsafe(observed.up.driver.fleet.set_operation, operation)
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=3000", "--dump-dom", f"http://{observed.address}/",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    observed.loop.call_soon_threadsafe(observed.up.driver.fleet.set_operation, None)
    text = " ".join(re.sub(r"<[^>]*>", " ", done.stdout).split())
    assert "<title>ready – stub – shardray</title>" in done.stdout
    assert "replica 0 ready" in text
    assert "tensor 0 stage 0 here · cpu pid 1 · layers 0–3 9 heads · 3 kv no report yet" in text
    assert re.search(r"between tokens, p50 p95 \S+ ms", text)
    assert text.count("KV cache") == 2
    assert re.search(r"scale since \S+( [AP]M)?: forming 1 more 80 %", text)
    assert not re.search(r"CONSOLE.*(Content Security Policy|Error)", done.stderr)
