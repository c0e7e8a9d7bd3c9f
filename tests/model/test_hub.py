"""Hub ids, against a small server that speaks the hub's HTTP interface, in processes with their own environment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {  # of org/tiny; org/pickled has the .bin only
    "config.json": b"{}",
    "model.safetensors": save({"weight": torch.ones(300_000)}),
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.safetensors": b"a copy",
    "README.md": b"words",
    "tokenizer.json": b"{}",
}
HEADERS_SCRIPT = """
import json, sys
from shardray.runtime.model.model_cache import ModelSourceError
from shardray.runtime.model.sources import read_headers
try:
    checkpoint = read_headers(sys.argv[1])
    tensors = {name: [str(info.dtype), list(info.shape)] for name, info in checkpoint.tensors.items()}
    print(json.dumps({"tensors": tensors, "files": sorted(path.name for path in checkpoint.folder.iterdir())}))
except ModelSourceError as error:
    print(json.dumps({"error": str(error)}))
"""
SCRIPT = """
import json, sys
from shardray.runtime.model.hub import fetch_from_hub
from shardray.runtime.model.model_cache import ModelSourceError
for argument in sys.argv[1:]:
    repo_id, _, revision = argument.partition("@")
    reports = []
    try:
        folder = fetch_from_hub(repo_id, revision or None, lambda *report: reports.append(report))
        print(json.dumps({"files": sorted(p.name for p in folder.rglob("*") if p.is_file()), "reports": reports}))
    except ModelSourceError as error:
        print(json.dumps({"error": str(error)}))
"""


@dataclass
class Hub:
    endpoint: str
    home: Path
    seen: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Authorization)
    num_bytes: int = 0  # that were sent

    def fetch(self, *arguments: str, script: str = SCRIPT, **environment: str) -> list[dict[str, Any]]:
        """The outcome for each ``repo_id`` or ``repo_id@revision``."""
        base = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        hub = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=base | hub | environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    found = Hub("", tmp_path_factory.mktemp("hub"))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            found.seen.append((self.path, self.headers.get("Authorization")))
            status, body, headers = route(self.path)
            if status == 200 and (wanted := self.headers.get("Range")):
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                status, body = 206, body[first : last + 1]
            found.num_bytes += len(body) if with_body else 0
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


def route(path: str) -> tuple[int, bytes, dict[str, str]]:
    path = path.split("?")[0]
    if "org/gated" in path:
        return 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
    if path.startswith("/api/models/org/tiny/tree/"):
        return as_json([tree_entry(name) for name in FILES])
    if path.startswith("/api/models/org/pickled/tree/"):
        return as_json([tree_entry("pytorch_model.bin"), tree_entry("config.json")])
    if path.endswith("/revision/main") and "org/none" not in path:
        return as_json({"_id": "1", "id": "org/tiny", "sha": COMMIT, "siblings": [], "private": False, "tags": []})
    if path.startswith("/api/models/org/tiny/revision/"):
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
    name = path.split(f"/resolve/{COMMIT}/")[-1]
    if name in FILES:
        return 200, FILES[name], {"ETag": f'"{blob_id(name)}"', "X-Repo-Commit": COMMIT}
    return 404, b"{}", {"X-Error-Code": "RepoNotFound"}


def as_json(content: object) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def blob_id(name: str) -> str:
    return hashlib.sha1(FILES[name]).hexdigest()


def tree_entry(name: str) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": blob_id(name)}


def test_a_snapshot_holds_no_pickle_and_is_found_offline_afterwards(hub: Hub) -> None:
    (answer,) = hub.fetch("org/tiny", HF_TOKEN="hf_secret")
    assert answer["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    asked = [(path, token) for path, token in hub.seen if "org/tiny" in path]
    assert not any("pytorch_model" in path or "original" in path for path, _ in asked)
    assert {token for _, token in asked} == {"Bearer hf_secret"}
    assert answer["reports"][0] == ["Downloading org/tiny", 0, None]
    assert answer["reports"][-1][1] >= len(FILES["model.safetensors"])
    num_requests = len(hub.seen)
    found, not_cached = hub.fetch("org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert found["files"] == answer["files"]
    assert not_cached["error"] == "org/other: not in the local hub cache and HF_HUB_OFFLINE is set"
    assert len(hub.seen) == num_requests


def test_what_a_hub_refuses_is_one_clear_line(hub: Hub) -> None:
    answers = hub.fetch("org/gated", "org/none", "org/tiny@v9", "org/pickled")
    gated, unknown, no_revision, pickled = (answer["error"] for answer in answers)
    assert gated == "org/gated: access is gated; accept its terms on its page and set HF_TOKEN"
    assert unknown.startswith("org/none: neither a folder here nor a repository on the hub")
    assert no_revision == "org/tiny: has no revision 'v9'"
    assert pickled.startswith("org/pickled: holds no *.safetensors")


def test_a_hub_out_of_reach_is_one_clear_line(hub: Hub) -> None:
    (answer,) = hub.fetch("org/other", HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "org/other: not in the local hub cache and the hub cannot be reached"


def test_of_a_model_that_is_not_here_the_headers_are_fetched_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    before, home = hub.num_bytes, str(tmp_path)
    (found,) = hub.fetch("org/tiny", script=HEADERS_SCRIPT, HF_HOME=home)
    assert found == {"tensors": {"weight": ["torch.float32", [300_000]]}, "files": ["config.json"]}
    assert hub.num_bytes - before < 110_000 < len(FILES["model.safetensors"]) / 10
    (fetched,) = hub.fetch("org/tiny", HF_HOME=home)
    assert fetched["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    (cached,) = hub.fetch("org/tiny", script=HEADERS_SCRIPT, HF_HOME=home, HF_HUB_OFFLINE="1")
    assert cached.get("tensors") == found["tensors"], cached


def test_after_a_pull_that_was_interrupted_headers_are_the_hub_s(hub: Hub, tmp_path: Path) -> None:
    home = str(tmp_path)
    hub.fetch("org/tiny", HF_HOME=home)
    (snapshot,) = tmp_path.glob("hub/models--org--tiny/snapshots/*")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (snapshot / "model.safetensors").rename(snapshot / shards[0])  # the second one was not reached
    index = {"weight_map": {"weight": shards[0], "more": shards[1]}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for listing in tmp_path.glob("hub/models--org--tiny/trees/*"):  # older huggingface_hubs keep none
        listing.unlink()
    (found,) = hub.fetch("org/tiny", script=HEADERS_SCRIPT, HF_HOME=home)
    assert found.get("tensors") == {"weight": ["torch.float32", [300_000]]}, found


def test_a_hub_s_refusal_of_headers_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    (gated,) = hub.fetch("org/gated", script=HEADERS_SCRIPT, HF_HOME=str(tmp_path))
    assert gated["error"] == "org/gated: access is gated; accept its terms on its page and set HF_TOKEN"
    (offline,) = hub.fetch("org/tiny", script=HEADERS_SCRIPT, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert offline["error"] == "org/tiny: not in the local hub cache and HF_HUB_OFFLINE is set"
