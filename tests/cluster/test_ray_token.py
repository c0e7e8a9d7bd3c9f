"""Which Ray gets a token from shardray: one that it starts itself, unless the environment decides."""

from __future__ import annotations

import os

import pytest

from shardray.runtime.cluster.ray_token import choose_token
from shardray.runtime.config import RaySettings

_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment, without what it says of tokens."""
    found = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_each_local_ray_has_a_token_of_its_own(environ: dict[str, str]) -> None:
    tokens = set()
    for _ in range(2):
        environ.pop("RAY_AUTH_MODE", None)
        choose_token(RaySettings())
        assert environ["RAY_AUTH_MODE"] == "token"
        tokens.add(environ["RAY_AUTH_TOKEN"])
    assert [len(token) for token in tokens] == [64, 64]


@pytest.mark.parametrize("said", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_MODE": "disabled"}])
def test_what_the_environment_says_stays(environ: dict[str, str], said: dict[str, str]) -> None:
    environ |= said
    choose_token(RaySettings())
    assert {name: environ[name] for name in _VARIABLES if name in environ} == said


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_a_cluster_that_is_joined_is_left_alone(environ: dict[str, str], address: str) -> None:
    choose_token(RaySettings(address=address))
    assert not environ.keys() & set(_VARIABLES)
