"""Starting and stopping the leader's server."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from shardray.parallel.credentials import Credentials
from shardray.parallel.greeting import Door
from shardray.parallel.place import Member
from shardray.runtime.cluster.leader import LeaderServer
from shardray.runtime.driver.link import ReplicaLink
from shardray.runtime.engine.request import EngineRequest, SamplingParams, TokenOutput
from shardray.runtime.server.loop import run
from tests.certificates import make_tls
from tests.serving import eventually
from tests.stub_engine import StubEngine
from tests.stub_replica import SECRET


def test_a_leader_without_a_secret_does_not_start() -> None:
    with pytest.raises(ValueError, match="secret"):
        LeaderServer().start("127.0.0.1", StubEngine(), Credentials("e", ""))


def test_a_leader_that_cannot_listen_says_where() -> None:
    with pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        LeaderServer().start("192.0.2.1", StubEngine(), SECRET)


def test_stop_and_publish_are_harmless_after_the_end() -> None:
    server, engine = LeaderServer(), StubEngine()
    server.start("127.0.0.1", engine, SECRET)
    num_threads = threading.active_count()
    server.stop("done")
    server.stop("again")
    server.publish([TokenOutput("a", 1)])
    assert threading.active_count() < num_threads


def test_a_door_that_was_closed_before_it_was_watched_lets_nobody_in() -> None:
    door = Door("127.0.0.1", SECRET, "driver")
    door.close()
    assert list(door.enter({0: Member(0, 0, 0)}, 1.0, math.inf)) == []


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
def test_the_loop_that_the_server_runs_on_speaks_with_leaders(has_tls: bool, tmp_path: Path) -> None:
    known = replace(SECRET, tls=make_tls(tmp_path) if has_tls else None)
    server, engine = LeaderServer(), StubEngine()
    address = f"127.0.0.1:{server.start('127.0.0.1', engine, known)}"
    threading.Thread(target=engine.run, args=(server.publish,), daemon=True).start()

    async def drive() -> list[int | None]:
        outputs: list[TokenOutput] = []
        link = ReplicaLink(lambda new, rejections: outputs.extend(new))
        assert await link.connect(address, known) == engine.info
        link.submit(EngineRequest(request_id="r", prompt_ids=(7, 8), params=SamplingParams(max_tokens=3)))
        link.forget_prefixes()
        await eventually(lambda: len(outputs) == 3 and engine.num_forgotten == 1)
        threading.Thread(target=server.stop, args=("over",)).start()
        assert await link.closed == "over"
        return [output.token_id for output in outputs]

    assert run(drive()) == [7, 8, 7]
    engine.stop()
