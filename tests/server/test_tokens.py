"""The file of tokens: what it may hold, how it is refused, and how it is read again."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from shardray.runtime.config import GrpcAuthSettings
from shardray.runtime.server.secret_files import SecretsError
from shardray.runtime.server.tokens import Role, TokenFile

TOKEN, OTHER = "vJ3kQ0mZr8sXw2Lq", "a-second-token-of-24-chr"


def write(folder: Path, text: str, mode: int = 0o600) -> TokenFile:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return TokenFile(GrpcAuthSettings(tokens=str(path)))


def started(folder: Path, text: str) -> TokenFile:
    tokens = write(folder, text)
    tokens.start()
    return tokens


def test_a_line_gives_name_roles_and_limits(tmp_path: Path) -> None:
    text = f"# who\n\nci inference {TOKEN} max_requests=8 max_queued=4\nops inference,control {OTHER}\n"
    tokens = started(tmp_path, text)
    grant = tokens.find(TOKEN)
    assert grant is not None
    assert (grant.caller.name, grant.caller.max_requests, grant.caller.max_queued) == ("ci", 8, 4)
    assert grant.roles == {Role.INFERENCE}
    grant = tokens.find(OTHER)
    assert grant is not None
    assert (grant.caller.max_requests, grant.roles) == (None, {Role.INFERENCE, Role.CONTROL})
    for unknown in ("", TOKEN[:-1], TOKEN.lower(), TOKEN + " ", "ü", "\udcff"):
        assert tokens.find(unknown) is None


def test_the_hash_of_a_token_is_as_good_and_is_no_token_itself(tmp_path: Path) -> None:
    hashed = "sha256:" + hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = started(tmp_path, f"ci inference {hashed}")
    assert tokens.find(TOKEN) is not None
    assert tokens.find(hashed) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no token"),
        ("# only a comment", "holds no token"),
        ("ci inference", "line 1: give a name, roles and a token"),
        (f"c/i inference {TOKEN}", "line 1: the name is not made of"),
        (f"\nci inference,admin {TOKEN}", "line 2: 'admin' is no role"),
        (f"ci , {TOKEN}", "line 1: '' is no role"),
        ("ci inference short-token", "line 1: the token is neither 16 to 512"),
        ("ci inference sha256:abcdef0123456789", "line 1: the token is neither 16 to 512"),
        (f"ci inference {TOKEN} max_tokens=3", "line 1: behind the token there may be max_requests"),
        (f"ci inference {TOKEN} max_requests=0", "line 1: max_requests is no whole number above 0"),
        (f"ci inference {TOKEN} max_requests=1 max_requests=2", "once each"),
        (f"ci inference {TOKEN}\nops control {TOKEN}", "line 2: the token is that of an earlier line"),
        (f"ci inference {TOKEN}\nci control {OTHER}", "line 2: ci has other roles or limits in an earlier line"),
    ],
)
def test_a_bad_line_is_named_and_no_token_is_quoted(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SecretsError, match=r"^grpc\.auth\.tokens: /.*") as caught:
        write(tmp_path, text).start()
    assert message in str(caught.value)
    assert not any(token in str(caught.value) for token in (TOKEN, OTHER, "short-token"))


@pytest.mark.parametrize(("mode", "is_refused"), [(0o600, False), (0o440, False), (0o604, True), (0o602, True)])
def test_a_file_that_every_user_may_open_is_refused(mode: int, is_refused: bool, tmp_path: Path) -> None:
    tokens = write(tmp_path, f"ci inference {TOKEN}", mode)
    if not is_refused:
        return tokens.start()
    with pytest.raises(SecretsError, match=r"open to every user of this machine; chmod o-rw /"):
        tokens.start()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretsError, match=r"grpc\.auth\.tokens: /.*absent cannot be read: No such file"):
        TokenFile(GrpcAuthSettings(tokens=str(tmp_path / "absent"))).start()


def test_a_token_is_exchanged_without_a_gap_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tokens = started(tmp_path, f"ci inference {TOKEN}")
    write(tmp_path, f"ci inference {TOKEN}\nci inference {OTHER}")
    tokens.refresh()
    assert tokens.find(TOKEN) == tokens.find(OTHER) is not None
    write(tmp_path, "ci inference")
    tokens.refresh()
    assert "line 1: give a name, roles and a token" in caplog.text
    assert "what was read before stays in use" in caplog.text
    assert tokens.find(OTHER) is not None
    write(tmp_path, f"ci inference {OTHER}\n")
    tokens.refresh()
    assert (tokens.find(TOKEN), tokens.find(OTHER) is None) == (None, False)
    num_records = len(caplog.records)
    tokens.refresh()
    assert len(caplog.records) == num_records, "a file that did not change is not read"


def test_a_file_that_is_replaced_by_a_link_is_read_again(tmp_path: Path) -> None:
    """As Kubernetes exchanges the files of a secret."""
    for name, token in (("one", TOKEN), ("two", OTHER)):
        (tmp_path / name).write_text(f"ci inference {token}")
        (tmp_path / name).chmod(0o440)
    link = tmp_path / "tokens"
    link.symlink_to("one")
    tokens = TokenFile(GrpcAuthSettings(tokens=str(link)))
    tokens.start()
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    tokens.refresh()
    assert (tokens.find(TOKEN), tokens.find(OTHER) is None) == (None, False)
