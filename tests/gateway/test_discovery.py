"""The file that gateways watch: who is entered in it, when, and what becomes of the others."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from shardray.runtime.config import GatewaySettings
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.gateway import discovery
from shardray.runtime.server.gateway.discovery import DiscoveryFile, DiscoveryFileError
from tests.serving import eventually, serving
from tests.stub_replica import SECRET

HERE, ELSEWHERE = "grpc://127.0.0.1:50061", "grpc://10.0.0.7:50061"


def urls(path: Path) -> list[str]:
    manifest = json.loads(path.read_text())
    assert (manifest["version"], set(manifest)) == (1, {"version", "workers"})
    return [worker["url"] for worker in manifest["workers"]]


def test_fleets_share_a_file_and_leave_each_other_alone(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({"version": 1, "workers": [{"id": "by hand", "url": "http://10.0.0.9:8000"}]}))
    one, other = DiscoveryFile(path), DiscoveryFile(path)
    one.enter(HERE)
    other.enter(ELSEWHERE)
    assert urls(path) == ["http://10.0.0.9:8000", HERE, ELSEWHERE]
    one.leave()
    one.leave()
    assert urls(path) == ["http://10.0.0.9:8000", ELSEWHERE]


def test_a_successor_takes_the_place_of_one_that_was_killed_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    killed, successor = DiscoveryFile(path), DiscoveryFile(path)
    killed.enter(HERE)
    before = json.loads(path.read_text())["workers"]
    successor.enter(HERE)
    after = json.loads(path.read_text())["workers"]
    assert [worker["url"] for worker in after] == [HERE]
    assert before[0]["id"] != after[0]["id"]
    killed.leave()  # late
    assert urls(path) == [HERE]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    fleets = [DiscoveryFile(path) for _ in range(2)]
    fleets[0].check()

    def come_and_go(number: int) -> None:
        for _ in range(10):
            fleets[number].enter(f"grpc://10.0.0.{number}:1")
            fleets[number].leave()

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen = urls(path)
        assert len(set(seen)) == len(seen)
        time.sleep(0.001)
    assert urls(path) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["workers.json", "workers.json.lock"]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2, "workers": []}', '{"version": 1, "workers": [3]}'])
def test_what_is_no_such_file_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "workers.json"
    path.write_text(content)
    with pytest.raises(DiscoveryFileError, match=r"gateway\.discovery_file: .*workers\.json .*; it has to be"):
        DiscoveryFile(path).check()
    assert path.read_text() == content


def test_a_file_that_cannot_be_written_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiscoveryFileError, match=r"cannot be written: .*; name a file in a folder of this user"):
        DiscoveryFile(tmp_path / "file" / "workers.json").check()
    monkeypatch.setattr(discovery, "_LOCK_S", 0.05)
    with FileLock(tmp_path / "workers.json.lock"), pytest.raises(DiscoveryFileError, match=r"is locked by another"):
        DiscoveryFile(tmp_path / "workers.json").check()


@pytest.mark.asyncio
async def test_a_server_is_entered_once_it_takes_requests_until_it_stops(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    settings = GatewaySettings(listen="127.0.0.1:0", discovery_file=str(path), advertise_host="front.example")
    async with serving(tokenizer, num_replicas=0, gateway=settings) as up:
        assert urls(path) == []
        async with serving(tokenizer) as other:
            await up.driver.attach(0, other.replicas[0].address, SECRET, [])
            await eventually(lambda: urls(path) == [f"grpc://front.example:{up.server.gateway_port}"])
            up.driver.give_up(0, "no room")
            assert len(urls(path)) == 1, "it says why itself, and may be mended"
            up.driver.refuse_new("the server is draining")
            await eventually(lambda: urls(path) == [])
