"""What the driver logs: ids of requests, and never what is in them."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from shardray.runtime.config import LoggingSettings
from shardray.runtime.observe.logs import FIELDS, REQUEST_ID, configure_logs
from tests.observe.conftest import SECRET_PROMPT, Observed

log = logging.getLogger("shardray.tests")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("shardray")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    for handler in handlers:  # those of pytest, which would be closed
        root.removeHandler(handler)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_is_one_object_a_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LoggingSettings(format="json", level="info"))
    log.info('a "quoted"\nsecond line %d', 7, extra={FIELDS: {"replica_id": 3}})
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    logging.getLogger("a.library").info("of no interest")
    warnings.warn("deprecated", stacklevel=1)
    first, second, third = lines(capsys)
    assert first["message"] == 'a "quoted"\nsecond line 7'
    assert (first["level"], first["logger"], first["replica_id"]) == ("info", "shardray.tests", 3)
    assert str(first["time"]).endswith("+00:00")
    assert "ValueError: broken" in str(second["exception"])
    assert (third["logger"], "deprecated" in str(third["message"])) == ("py.warnings", True)


def test_a_line_says_which_request_is_being_handled(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LoggingSettings(format="json"))
    token = REQUEST_ID.set("req-7")
    log.warning("something")
    REQUEST_ID.reset(token)
    log.warning("something else")
    configure_logs(LoggingSettings(format="text"))
    REQUEST_ID.set("req-8")
    log.warning("again")
    REQUEST_ID.set(None)
    first, second, third = capsys.readouterr().err.splitlines()
    assert json.loads(first)["request_id"] == "req-7"
    assert "request_id" not in json.loads(second)
    assert third.endswith("WARNING again (request req-8)")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_that_of_our_own_loggers(capsys: pytest.CaptureFixture[str], level: str) -> None:
    configure_logs(LoggingSettings(format="json", level=level))  # type: ignore[arg-type]
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)(name)
    found = [line["message"] for line in lines(capsys)]
    assert found == ["debug", "info", "warning", "error"][-len(found) :]
    assert found[0] == level


@pytest.mark.parametrize("format_", ["text", "json"])
def test_an_ended_request_is_a_line_without_its_prompt_or_its_tokens(
    observed: Observed, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    configure_logs(LoggingSettings(format=format_, level="debug"))  # type: ignore[arg-type]
    observed.generate(max_tokens=4, ignore_eos=True, request_id="by-name")
    with pytest.raises(Exception, match="temperature"):
        observed.generate(temperature=-1.0)
    written = capsys.readouterr().err
    assert "request by-name ended: finish_reason length, num_prompt_tokens 6, num_output_tokens 4" in written
    assert written.count("\n") == 1
    for start in range(len(SECRET_PROMPT) - 1):
        assert f"{SECRET_PROMPT[start]}, {SECRET_PROMPT[start + 1]}" not in written
