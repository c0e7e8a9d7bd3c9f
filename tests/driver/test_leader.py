"""Starting and stopping the leader's server."""

from __future__ import annotations

import threading

import pytest

from shardray.parallel.credentials import Credentials
from shardray.runtime.cluster.leader import LeaderServer
from shardray.runtime.engine.request import TokenOutput
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
