"""Certificates of the cluster's own: what is wrong with files, and who is let in over TLS."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardray.parallel.credentials import Credentials
from shardray.parallel.errors import MeshAborted, PeerLost
from shardray.parallel.greeting import LinkListener, connect
from shardray.parallel.link import Link
from shardray.parallel.mesh import Mesh
from shardray.parallel.place import Member
from shardray.parallel.tls import TlsError, TlsFiles
from tests.certificates import lets_in, make_tls, signed_by
from tests.parallel.rank_processes import RankProcesses

HOST = "127.0.0.1"
MEMBERS = [Member(rank, 0, rank, pid=1000 + rank, host=HOST) for rank in range(3)]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other_tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("other_tls"))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def listener(tls: TlsFiles) -> Iterator[LinkListener]:
    listener = LinkListener(HOST, Credentials("e", "open sesame", tls))
    yield listener
    listener.close()


def join(listener: LinkListener, rank: int, tls: TlsFiles | None) -> Link:
    return connect((HOST, listener.port), Credentials("e", "open sesame", tls), rank, MEMBERS[0], 5.0, 5.0)


@pytest.fixture
def pair(listener: LinkListener, tls: TlsFiles, threads: ThreadPoolExecutor) -> Iterator[tuple[Link, Link]]:
    accepted = threads.submit(listener.accept, MEMBERS[1:2], 5.0, 5.0)
    links = join(listener, 1, tls), accepted.result()[1]
    yield links
    for link in links:
        link.close()


def test_good_files_pass(tls: TlsFiles) -> None:
    tls.check()


def test_a_bad_file_is_named_with_its_key(tls: TlsFiles, other_tls: TlsFiles, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n")
    cases = [
        (replace(tls, ca="/nowhere/ca.pem"), "cluster.tls.ca: /nowhere/ca.pem cannot be read: No such file"),
        (replace(tls, key=str(tmp_path)), f"cluster.tls.key: {tmp_path} cannot be read: Is a directory"),
        (replace(tls, cert=tls.key), "cluster.tls.cert: .* holds no certificate in PEM form"),
        (replace(tls, key=tls.cert), "cluster.tls.key: .* holds no private key in PEM form"),
        (replace(tls, ca=str(garbage)), "cluster.tls.ca: .*garbage.pem"),
        (replace(tls, key=other_tls.key), "cluster.tls.key: .* key values mismatch; it has to be the private key"),
        (replace(tls, ca=other_tls.ca), "cluster.tls.cert: .*; it has to be signed by cluster.tls.ca"),
        (make_tls(tmp_path / "named", name="elsewhere.example"), "cluster.tls.cert: .* name shardray"),
        (make_tls(tmp_path / "expired", expired=True), "cluster.tls.cert: .* has expired"),
    ]
    for files, message in cases:
        with pytest.raises(TlsError, match=message) as caught:
            files.check()
        assert "\n" not in str(caught.value)
        assert "PRIVATE" not in str(caught.value)


def test_an_encrypted_key_is_refused_without_asking_for_a_password(tls: TlsFiles, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(tls.key).read_bytes(), password=None)
    encrypted = tmp_path / "key.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TlsError, match=r"cluster\.tls\.key: /.*key\.pem: pem lib; .*not encrypted"):
        replace(tls, key=str(encrypted)).check()


def test_a_link_over_tls_is_a_link(pair: tuple[Link, Link]) -> None:
    here, there = pair
    frames = [b"a", b"", bytes(range(256)) * 4000, b"goodbye"]
    sender = threading.Thread(target=lambda: [here.send(data) for data in frames])
    sender.start()
    assert [there.recv(5.0) for _ in frames] == frames
    sender.join()
    there.check()
    here.close()
    with pytest.raises(PeerLost, match="the connection was closed"):
        there.check()
    with pytest.raises(PeerLost):
        there.recv(1.0)


def test_both_ends_can_send_much_while_they_receive(pair: tuple[Link, Link], threads: ThreadPoolExecutor) -> None:
    frames = [os.urandom(300_000) for _ in range(20)]
    sending = [threads.submit(lambda link=link: [link.send(frame) for frame in frames]) for link in pair]
    receiving = [threads.submit(lambda link=link: [link.recv(20.0) for _ in frames]) for link in pair]
    assert [future.result(30) for future in receiving] == [frames, frames]
    for future in sending:
        future.result(30)


def test_abort_wakes_a_rank_that_waits_on_tls(pair: tuple[Link, Link], threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(pair[0].recv)
    time.sleep(0.1)
    pair[0].abort()
    with pytest.raises(MeshAborted):
        waiting.result(timeout=2.0)


def test_what_goes_over_the_wire_is_not_readable(
    listener: LinkListener, tls: TlsFiles, threads: ThreadPoolExecutor
) -> None:
    """A relay between the two sees every byte."""
    accepted = threads.submit(listener.accept, MEMBERS[1:2], 5.0, 5.0)
    seen = bytearray()
    with socket.create_server((HOST, 0)) as relay:

        def pump(source: socket.socket, sink: socket.socket) -> None:
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)

        def run() -> None:
            outer = relay.accept()[0]
            inner = socket.create_connection((HOST, listener.port))
            threads.submit(pump, inner, outer)
            pump(outer, inner)

        threading.Thread(target=run, daemon=True).start()
        known = Credentials("e", "open sesame", tls)
        link = connect(relay.getsockname(), known, 1, MEMBERS[0], 5.0, 5.0)
        there = accepted.result()[1]
        link.send(b"a plan of the step")
        assert there.recv(5.0) == b"a plan of the step"
        link.close()
        there.close()
    assert len(seen) > 1000
    assert b"open sesame" not in seen
    assert b"a plan" not in seen


def test_only_who_has_a_certificate_of_the_clusters_authority_gets_in(
    listener: LinkListener,
    tls: TlsFiles,
    other_tls: TlsFiles,
    tmp_path: Path,
    threads: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    accepted = threads.submit(listener.accept, MEMBERS[1:2], 20.0, 5.0)
    with pytest.raises(PeerLost):
        join(listener, 1, None)  # knows the secret, and speaks in plain text
    with pytest.raises(PeerLost):
        join(listener, 1, signed_by(tls, other_tls))
    with pytest.raises(PeerLost, match=r"self-signed certificate|unable to get local issuer"):
        join(listener, 1, other_tls)  # it refuses us
    assert not lets_in(listener.port, tls.ca, None)
    link = join(listener, 1, tls)
    accepted.result()[1].close()
    link.close()
    told = " | ".join(record.getMessage() for record in caplog.records)
    for reason in ("wrong version number", "unable to get local issuer", "peer did not return a certificate"):
        assert reason in told, told
    assert "from 127.0.0.1:" in told


def sum_and_end(mesh: Mesh) -> float:
    x = mesh.tp.all_reduce(torch.full((3,), float(mesh.spec.rank + 1)))
    mesh.agree_on_minimum("done", 1)
    return float(x[0])


@pytest.mark.parametrize("nodes", [("a", "a"), ("a", "b")])
def test_a_mesh_forms_over_tls(ranks: RankProcesses, tls: TlsFiles, nodes: tuple[str, ...]) -> None:
    assert ranks.run(sum_and_end, tp_size=2, nodes=nodes, tls=tls) == [3.0, 3.0]
