"""How commands show a server who they are, and what they say when that is not enough."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardray.runtime.cli.app import run
from shardray.runtime.client import Access
from shardray.runtime.config import GrpcAuthSettings, GrpcSettings, GrpcTlsSettings
from tests.certificates import make_tls
from tests.serving import in_thread, serving

TOKENS = {"ci": "token-of-ci-00001", "ops": "token-of-ops-0001"}


@dataclass
class Guarded:
    address: str
    folder: Path

    def ask(self, *arguments: str) -> int:
        return run(["status", "--json", "--server", self.address, *arguments])

    def file(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with TLS and tokens, in the loop of another thread."""
    folder = tmp_path_factory.mktemp("guarded")
    files = make_tls(folder, "127.0.0.1")
    Path(files.key).chmod(0o600)
    (folder / "tokens").write_text(f"ci inference {TOKENS['ci']}\nops control {TOKENS['ops']}\n")
    (folder / "tokens").chmod(0o600)
    for name, token in TOKENS.items():
        (folder / name).write_text(token + "\n")
    make_tls(folder / "other")
    settings = GrpcSettings(
        listen="127.0.0.1:0",
        tls=GrpcTlsSettings(cert=files.cert, key=files.key),
        auth=GrpcAuthSettings(tokens=str(folder / "tokens")),
    )
    with in_thread(serving(None, num_replicas=0, grpc=settings, access=Access(ca=files.ca))) as up:
        yield Guarded(up.address, folder)


def test_certificates_and_tokens_come_from_options_or_the_environment(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded.ask("--ca", guarded.file("ca.pem"), "--token-file", guarded.file("ops")) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == "stub"
    assert "SHARDRAY_CA" not in os.environ, "what was an option is gone afterwards"
    monkeypatch.setenv("SHARDRAY_CA", guarded.file("ca.pem"))
    monkeypatch.setenv("SHARDRAY_TOKEN", TOKENS["ops"])
    assert guarded.ask() == 0
    assert guarded.ask("--token-file", guarded.file("ci")) == 1, "an option counts more"
    assert os.environ["SHARDRAY_CA"] == guarded.file("ca.pem")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ([], 1, "closed the connection; does it ask for TLS (--tls, --ca)"),
        (["--ca", "other/ca.pem"], 1, "is not signed by an authority that is trusted here; give that one with --ca"),
        (["--ca", "absent.pem"], 2, "absent.pem cannot be read: No such file or directory"),
        (["--ca", "ca.pem"], 1, "a token is asked for: send it once"),
        (["--ca", "ca.pem", "--token-file", "ca.pem"], 2, "ca.pem holds no token: give one line"),
        (
            ["--ca", "ca.pem", "--token-file", "ci"],
            1,
            "ci has the role inference, and shardray.v1.ControlService needs",
        ),
        (["--ca", "ca.pem", "--cert", "cert.pem"], 2, "certificate and its private key belong together"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_with_the_fix(
    guarded: Guarded, arguments: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [one if one.startswith("--") else guarded.file(one) for one in arguments]
    assert guarded.ask(*found) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert not any(token in captured.err for token in TOKENS.values())


def test_a_token_is_no_option(guarded: Guarded, capsys: pytest.CaptureFixture[str]) -> None:
    """Every user of a machine may read the command lines of its processes."""
    assert guarded.ask("--token", TOKENS["ops"]) == 2
    assert "No such option: --token" in capsys.readouterr().err
