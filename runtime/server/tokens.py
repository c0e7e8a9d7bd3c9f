"""The file of tokens: who may call what, and how much at once.

One token a line: name, roles, the token itself or the SHA-256 of it, and limits, with blanks between them:

    ci   inference          vJ3kQ0mZr8sXw2Lq                  max_requests=8 max_queued=4
    ops  inference,control  sha256:9f86d081884c7d659a2feaa0…
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from shardray.runtime.config import GrpcAuthSettings
from shardray.runtime.driver.caller import Caller
from shardray.runtime.server.secret_files import SecretFiles, SecretsError, read_file

_KEY = "grpc.auth.tokens"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_LIMITS = ("max_requests", "max_queued")


class UnauthenticatedError(Exception):
    """The call shows no token that is known."""


class RoleMissingError(Exception):
    """The token is known, and not for this."""


class Role(enum.StrEnum):
    INFERENCE = "inference"
    CONTROL = "control"


@dataclass(frozen=True)
class Grant:
    """What a token stands for."""

    caller: Caller
    roles: frozenset[Role]


class TokenFile(SecretFiles):
    """Call ``start`` before anything else."""

    def __init__(self, settings: GrpcAuthSettings) -> None:
        super().__init__(settings.tokens)
        self._path = settings.tokens
        self._salt = secrets.token_bytes(32)
        self._grants: dict[bytes, Grant] = {}

    def load(self) -> None:
        text = read_file(_KEY, self._path, is_secret=True).decode("utf-8", errors="replace")
        grants: dict[bytes, Grant] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            try:
                digest, grant = _parse(words)
                _check_against(grants, self._salted(digest), grant)
            except ValueError as error:
                raise SecretsError(f"{_KEY}: {self._path}, line {number}: {error}") from None
            grants[self._salted(digest)] = grant
        if not grants:
            raise SecretsError(f"{_KEY}: {self._path} holds no token; give a line such as: NAME inference TOKEN")
        self._grants = grants

    def find(self, token: str) -> Grant | None:
        """What ``token`` stands for. The time that this takes tells nothing of the tokens that there are: they are
        looked for by a hash with a salt that nobody knows."""
        return self._grants.get(self._salted(hashlib.sha256(token.encode("utf-8", errors="replace")).digest()))

    def _salted(self, digest: bytes) -> bytes:
        return hmac.digest(self._salt, digest, "sha256")


def _parse(words: list[str]) -> tuple[bytes, Grant]:
    """The SHA-256 of the token, and its grant. Raises ValueError, without the token."""
    if len(words) < 3:
        raise ValueError("give a name, roles and a token, for example: NAME inference,control TOKEN")
    name, roles, token = words[:3]
    if not _NAME.fullmatch(name):
        raise ValueError("the name is not made of at most 64 letters, digits, points, dashes and underscores")
    unknown = sorted(set(roles.split(",")) - {role.value for role in Role})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no role; give inference, control or both with a comma")
    caller = Caller(name, **_limits(words[3:]))
    return _digest(token), Grant(caller, frozenset(Role(role) for role in roles.split(",")))


def _digest(token: str) -> bytes:
    if (hashed := _HASHED.fullmatch(token)) is not None:
        return bytes.fromhex(hashed[1])
    if token.startswith("sha256:") or not _TOKEN.fullmatch(token):
        raise ValueError("the token is neither 16 to 512 printable ASCII characters nor sha256: and 64 hex digits")
    return hashlib.sha256(token.encode()).digest()


def _limits(words: list[str]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in _LIMITS or key in limits:
            raise ValueError(f"behind the token there may be {' and '.join(_LIMITS)}, once each: {_LIMITS[0]}=8")
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ValueError(f"{key} is no whole number above 0")
        limits[key] = int(value)
    return limits


def _check_against(grants: dict[bytes, Grant], digest: bytes, grant: Grant) -> None:
    """A name may have several tokens, so that they can be exchanged without a gap. Raises ValueError."""
    if digest in grants:
        raise ValueError("the token is that of an earlier line")
    if any(other.caller.name == grant.caller.name and other != grant for other in grants.values()):
        raise ValueError(f"{grant.caller.name} has other roles or limits in an earlier line; give it the same")
