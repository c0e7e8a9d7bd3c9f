"""The short form of the load test; ``make load`` is the long one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.outside.conftest import TOKEN, Guarded
from tests.outside.load import STEP_TIME_S, k6, paced
from tests.serving import Serving

pytestmark = pytest.mark.integration
NUM_STREAMS = 24


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with paced(tmp_path_factory.mktemp("tokenizer"), NUM_STREAMS) as serving:
        yield serving


def test_streams_of_many_clients_come_through_at_the_pace_of_the_engine(up: Serving) -> None:
    """Bounds for a machine that runs other tests as well; those of the script are for one that does not."""
    least = 0.2 * NUM_STREAMS / STEP_TIME_S
    done = k6(
        up.address, streams=NUM_STREAMS, duration="3s", max_tokens=30,
        first_token_ms=4000, inter_token_ms=600, tokens_per_s=least,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_threshold_that_is_crossed_fails_the_load(up: Serving) -> None:
    done = k6(up.address, streams=2, duration="1s", max_tokens=5, inter_token_ms=1)
    assert done.returncode == 99, done.stdout
    assert "inter_token_ms" in done.stderr


def test_it_gets_in_where_tls_and_tokens_are_asked_for(guarded: Guarded) -> None:
    bounds = {"first_token_ms": 4000, "inter_token_ms": 1000}
    done = k6(guarded.address, streams=2, duration="1s", max_tokens=20, token=TOKEN, ca=guarded.ca, **bounds)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = k6(guarded.address, streams=1, duration="1s", max_tokens=20, ca=guarded.ca)
    assert refused.returncode != 0
    assert "a token is asked for" in refused.stderr
