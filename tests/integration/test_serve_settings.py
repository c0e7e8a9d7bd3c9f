"""Settings that ``shardray serve`` alone hands on: what callers share of their prompts, and the grace of a SIGTERM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardray.runtime.client import Access, Client, ServerError
from tests.command import Command
from tests.integration.tiny_fleet import NUM_TOKENS, PROMPT_IDS, save_tiny, tiny_fleet
from tests.tiny_models import Reference

pytestmark = pytest.mark.integration

TOKENS = {"ann": "token-of-ann-0001", "bob": "token-of-bob-0001"}
LONG_PROMPT = tuple(range(5, 55))  # three whole pages of 16 tokens, and two tokens more


@dataclass(frozen=True)
class Case:
    shares_prefixes: bool
    grace_s: float  # longer than a stream of NUM_TOKENS takes, or far shorter


@dataclass(frozen=True)
class Fleet:
    case: Case
    command: Command
    address: str

    def client_of(self, name: str) -> Client:
        return Client(self.address, timeout_s=60, access=Access(token=TOKENS[name]))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=[Case(False, 60), Case(True, 0.05)], ids=["apart, patient", "shared, hasty"])
def fleet(
    model_folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    tokens = tmp_path_factory.mktemp("secrets") / "tokens"
    tokens.write_text("".join(f"{name} inference {token}\n" for name, token in TOKENS.items()))
    tokens.chmod(0o600)
    case: Case = request.param
    settings = (
        f"grpc.auth.tokens={tokens}",
        f"grpc.auth.share_prefixes={str(case.shares_prefixes).lower()}",
        f"limits.shutdown_grace_s={case.grace_s}",
    )
    with tiny_fleet(model_folder, *settings) as command:
        yield Fleet(case, command, command.until_event("serving")["address"])


def num_cached(client: Client) -> int:
    return client.generate(LONG_PROMPT, max_tokens=1).usage.num_cached_prompt_tokens


def test_callers_find_what_others_computed_only_where_prefixes_are_shared(fleet: Fleet) -> None:
    with fleet.client_of("ann") as ann, fleet.client_of("bob") as bob:
        assert num_cached(ann) == 0
        assert num_cached(ann) == 48, "what is its own, a caller finds in any case"
        assert num_cached(bob) == (48 if fleet.case.shares_prefixes else 0)


def test_sigterm_lets_a_stream_end_within_the_grace_and_fails_it_beyond(fleet: Fleet, model_folder: Path) -> None:
    """The last test here: the fleet is gone afterwards."""
    with fleet.client_of("ann") as client, fleet.client_of("bob") as late:
        late.model()  # it is connected
        stream = client.stream(PROMPT_IDS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        token_ids = list(next(stream).token_ids)
        fleet.command.process.terminate()
        if fleet.case.grace_s > 1:
            with pytest.raises(ServerError, match="shutting down"):
                _until_refused(late)
            token_ids += [token_id for delta in stream for token_id in delta.token_ids]
            assert token_ids == Reference(model_folder).greedy(PROMPT_IDS, NUM_TOKENS)
        else:
            with pytest.raises(ServerError, match="shutting down") as failed:
                token_ids += [token_id for delta in stream for token_id in delta.token_ids]
            assert failed.value.code == "UNAVAILABLE"
            assert failed.value.retry_after_s is not None
    assert fleet.command.process.wait(timeout=60) == 0


def _until_refused(client: Client) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        client.generate(PROMPT_IDS, max_tokens=1)
