"""Control links over loopback: frames, hellos, strangers, and what a blocked rank learns."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import CollectiveTimeout, MeshAborted, PeerLost
from shardray.parallel.greeting import LinkListener, connect
from shardray.parallel.link import Link
from shardray.parallel.place import Member

HOST = "127.0.0.1"
EPOCH, SECRET = "e1", "open sesame"
CREDENTIALS = Credentials(EPOCH, SECRET)
MEMBERS = [Member(rank, 0, rank, pid=1000 + rank, host=HOST) for rank in range(4)]
LEADER = MEMBERS[0]


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.create_connection, socket.create_server((HOST, 0))
    client = ours(theirs.getsockname())
    server = theirs.accept()[0]
    theirs.close()
    links = Link(client, LEADER, 0.5), Link(server, MEMBERS[1], 0.5)
    yield links
    for link in links:
        link.close()


@pytest.fixture
def listener() -> Iterator[LinkListener]:
    listener = LinkListener(HOST, CREDENTIALS)
    yield listener
    listener.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def join(listener: LinkListener, rank: int, epoch: str = EPOCH, secret: str = SECRET) -> Link:
    return connect((HOST, listener.port), Credentials(epoch, secret), rank, LEADER, form_timeout_s=5.0, timeout_s=5.0)


def stranger(listener: LinkListener, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection((HOST, listener.port))
    sock.sendall(data)
    return sock


def frame(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


def accept(
    threads: ThreadPoolExecutor, listener: LinkListener, ranks: list[int], timeout_s: float = 5.0
) -> Future[dict[int, Link]]:
    return threads.submit(listener.accept, [MEMBERS[rank] for rank in ranks], timeout_s, 5.0)


def close(*links: Link) -> None:
    for link in links:
        link.close()


def test_frames_arrive_whole_and_in_order(pair: tuple[Link, Link]) -> None:
    here, there = pair
    frames = [b"a", b"", bytes(range(256)) * 4000, b"goodbye"]
    sender = threading.Thread(target=lambda: [here.send(data) for data in frames])
    sender.start()
    assert [there.recv(5.0) for _ in frames] == frames
    sender.join()
    there.send(b"answer")
    assert here.recv() == b"answer"


def test_a_frame_that_does_not_come_names_the_peer_at_the_deadline(pair: tuple[Link, Link]) -> None:
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout, match=r"stage 0 tensor rank 1 \(rank 1, pid 1001 on 127.0.0.1\)") as caught:
        pair[1].recv(0.2)
    assert caught.value.missing == (1,)
    assert 0.15 < time.monotonic() - began < 1.0


def test_a_trickle_of_bytes_does_not_stretch_the_deadline(pair: tuple[Link, Link]) -> None:
    stop = threading.Event()

    def trickle() -> None:
        pair[0]._socket.sendall(struct.pack("!I", 1000))
        while not stop.wait(0.05):
            pair[0]._socket.sendall(b"x")

    dripping = threading.Thread(target=trickle)
    dripping.start()
    began = time.monotonic()
    with pytest.raises(CollectiveTimeout):
        pair[1].recv(0.3)
    assert time.monotonic() - began < 1.0
    stop.set()
    dripping.join()


def test_a_peer_that_takes_nothing_is_named_at_the_deadline(pair: tuple[Link, Link]) -> None:
    with pytest.raises(CollectiveTimeout, match="control frame sent: stage 0 tensor rank 0"):
        pair[0].send(bytes(64 << 20))


def test_the_end_of_the_connection_is_a_lost_peer(pair: tuple[Link, Link]) -> None:
    pair[0].check()
    pair[1].close()
    for operation in (pair[0].recv, pair[0].check):
        with pytest.raises(PeerLost, match=r"lost stage 0 tensor rank 0 .*the connection was closed") as caught:
            operation()
        assert caught.value.missing == (0,)


def test_a_connection_that_ends_inside_a_frame_is_a_lost_peer(pair: tuple[Link, Link]) -> None:
    pair[0]._socket.sendall(struct.pack("!I", 10) + b"half")
    pair[0].close()
    with pytest.raises(PeerLost):
        pair[1].recv(5.0)


def test_an_oversize_frame_is_neither_read_nor_sent(pair: tuple[Link, Link]) -> None:
    pair[0]._socket.sendall(b"\xff\xff\xff\xffGET / HTTP/1.1")
    with pytest.raises(PeerLost, match="4294967295 bytes is not one of ours"):
        pair[1].recv(5.0)


def test_abort_wakes_a_rank_that_waits_without_a_deadline(pair: tuple[Link, Link], threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(pair[0].recv)
    time.sleep(0.1)
    pair[0].abort()
    with pytest.raises(MeshAborted):
        waiting.result(timeout=2.0)
    pair[0].abort()  # again, after the end
    with pytest.raises(MeshAborted):
        pair[0].send(b"late")


def test_a_waiting_rank_uses_no_cpu(pair: tuple[Link, Link]) -> None:
    used: list[float] = []

    def wait() -> None:
        began = time.thread_time()
        pair[1].recv()
        used.append(time.thread_time() - began)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    pair[0].send(b"")
    waiting.join()
    assert used[0] < 0.005


def test_every_rank_gets_its_own_link(listener: LinkListener, threads: ThreadPoolExecutor) -> None:
    accepted = accept(threads, listener, [1, 2, 3])
    workers = {rank: threads.submit(join, listener, rank) for rank in (3, 1, 2)}
    links = accepted.result()
    for rank, worker in workers.items():
        worker.result().send(f"I am {rank}".encode())
        assert links[rank].recv(5.0) == f"I am {rank}".encode()
    close(*links.values(), *(worker.result() for worker in workers.values()))


def test_wrong_hellos_are_refused_and_logged_while_the_right_ones_get_in(
    listener: LinkListener, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    accepted = accept(threads, listener, [1, 2])
    wrong = [{"epoch": "old"}, {"secret": "guess"}, {"rank": 7}, {"rank": 0}]
    for fields in wrong:
        with pytest.raises(PeerLost):
            join(listener, **({"rank": 1} | fields))
    first = join(listener, 1)
    with pytest.raises(PeerLost):
        join(listener, 1)
    second = join(listener, 2)
    assert accepted.result().keys() == {1, 2}
    reasons = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    twice = "wrong epoch or secret"
    assert reasons == [twice, *(f"rank {rank} is not awaited" for rank in (7, 0, 1)), twice]
    assert SECRET not in caplog.text
    close(first, second, *accepted.result().values())


def test_garbage_and_oversize_hellos_are_refused(
    listener: LinkListener, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    accepted = accept(threads, listener, [1])
    hello = {"epoch": EPOCH, "secret": SECRET, "rank": 1}
    garbage = [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"not json"),
        frame(b""),
        frame(b"[" * 4000),
        frame(b"[1, 2]"),
        frame(b"\xff\xfe"),
        frame(json.dumps(hello | {"rank": "1"}).encode()),
        frame(json.dumps(hello | {"secret": 5}).encode()),
        frame(json.dumps(hello | {"secret": "\ud800"}).encode()),
        frame(json.dumps({"rank": 1}).encode()),
        struct.pack("!I", 5000) + b"x" * 5000,
    ]
    strangers = [stranger(listener, data) for data in garbage]
    link = join(listener, 1)
    assert accepted.result().keys() == {1}
    told = "".join(record.getMessage() for record in caplog.records)
    assert "refused a control connection from 127.0.0.1:" in told
    assert "no hello but a frame of 1195725856 bytes" in told  # GET
    assert f"refused {len(garbage) - 1} more control connections from 127.0.0.1: no hello" in told
    for sock in strangers:
        sock.close()
    close(link, *accepted.result().values())


def test_silent_connections_delay_nobody(listener: LinkListener, threads: ThreadPoolExecutor) -> None:
    accepted = accept(threads, listener, [1, 2])
    silent = [stranger(listener, data) for data in (b"", b"\x00", b"\x00\x00\x00\x20{") for _ in range(10)]
    began = time.monotonic()
    workers = [threads.submit(join, listener, rank) for rank in (1, 2)]
    links = accepted.result()
    assert time.monotonic() - began < 1.0
    for sock in silent:
        sock.settimeout(2.0)
        try:
            assert sock.recv(1) == b""  # shut out once the mesh has formed
        except ConnectionResetError:
            pass
        finally:
            sock.close()
    close(*links.values(), *(worker.result() for worker in workers))


def test_ranks_that_do_not_come_are_named(listener: LinkListener, threads: ThreadPoolExecutor) -> None:
    accepted = accept(threads, listener, [1, 2, 3], timeout_s=0.5)
    link = join(listener, 2)
    with pytest.raises(
        CollectiveTimeout, match=r"forming the control links: stage 0 tensor rank 1 .* and .* rank 3"
    ) as caught:
        accepted.result()
    assert caught.value.missing == (1, 3)
    with pytest.raises(PeerLost):
        link.recv(2.0)  # the others' links were closed
    link.close()


def test_a_leader_that_does_not_listen_is_named() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PeerLost, match=f"control link to 127.0.0.1:{port}: lost stage 0 tensor rank 0"):
        connect((HOST, port), CREDENTIALS, 1, LEADER, 1.0, 1.0)
