"""Well-formed messages with values that mean harm are refused by name, and the server serves on."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from shardray.runtime.client.errors import to_server_error
from tests.abuse.fleet import AbusedFleet
from tests.abuse.values import FORESEEN, GENERATE, HUGE, ask, calls, connect, failure

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def channel(fleet: AbusedFleet) -> Iterator[grpc.Channel]:
    with connect(fleet.address) as opened:
        yield opened


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls())
def test_no_value_is_an_error_that_nobody_foresaw(channel: grpc.Channel, call: tuple[str, bytes]) -> None:
    error = failure(channel, *call)
    if error is not None:
        assert error.code() in FORESEEN, error.details()  # type: ignore[attr-defined]
        told = to_server_error(error, "")
        assert (told.reason == "BAD_FIELD") == (told.code == "INVALID_ARGUMENT") == bool(told.fields), told


@pytest.mark.parametrize("field", HUGE)
def test_a_field_as_large_as_a_message_may_be_is_refused_by_name(channel: grpc.Channel, field: str) -> None:
    code, details = ask(channel, GENERATE, HUGE[field]().SerializeToString(), timeout_s=10)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(field)


def test_nothing_of_it_is_left(fleet: AbusedFleet) -> None:
    assert fleet.left() == []
