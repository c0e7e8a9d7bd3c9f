"""The metrics port over HTTP: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import socket
import threading
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from shardray.runtime.cli.app import run
from shardray.runtime.client import ServerError
from shardray.runtime.config import Config, MetricsSettings, ModelSettings
from shardray.runtime.observe.catalog import METRICS
from shardray.runtime.observe.extras import MissingExtraError, check_extras
from shardray.runtime.observe.web import MetricsListenError, WebServer
from tests.observe.conftest import Observed

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "


def samples(observed: Observed) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, in the order of their names; the model is left out."""
    _, text = observed.get("/metrics")
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_of_ours_is_in_the_catalog(observed: Observed) -> None:
    _, text = observed.get("/metrics")
    exported = {family.name for family in text_string_to_metric_families(text)}
    of_the_process = {name for name in exported if name.startswith("process_")}
    assert exported - of_the_process == {metric.name for metric in METRICS}
    assert "process_cpu_seconds" in of_the_process


def test_a_request_is_counted_once_with_its_times(observed: Observed) -> None:
    before = samples(observed)
    observed.generate(max_tokens=9, ignore_eos=True)
    after = samples(observed)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:request_success_total", "length"] == 1
    assert grown["vllm:time_to_first_token_seconds_count",] == 1
    assert grown["vllm:inter_token_latency_seconds_count",] == 8
    assert grown["vllm:request_prompt_tokens_sum",] == 6
    assert grown["vllm:request_generation_tokens_sum",] == 9
    assert grown["vllm:request_params_max_tokens_sum",] == 9
    assert grown["shardray:calls_total", "OK", "Generate"] == 1
    total = grown["vllm:e2e_request_latency_seconds_sum",]
    parts = [grown[f"vllm:request_{part}_time_seconds_sum",] for part in ("queue", "prefill", "decode")]
    assert 0 < sum(parts) <= total < 10
    assert grown["vllm:request_inference_time_seconds_sum",] <= total


def test_what_is_refused_is_counted_by_its_code(observed: Observed) -> None:
    before = samples(observed)
    with pytest.raises(ServerError):
        observed.generate(temperature=-1.0)
    after = samples(observed)
    key = ("shardray:calls_total", "INVALID_ARGUMENT", "Generate")
    assert after[key] - before.get(key, 0.0) == 1
    assert sum(after[name] - before[name] for name in before if name[0] == "vllm:request_success_total") == 0


def test_a_cancelled_request_is_an_abort(observed: Observed) -> None:
    async def leave() -> None:
        stream = observed.up.client.stream([1, 2, 3], max_tokens=400, ignore_eos=True, resumable_s=0)
        await anext(aiter(stream))
        await stream.aclose()

    before = samples(observed)["vllm:request_success_total", "abort"]
    observed.run(leave())
    deadline = time.monotonic() + 5
    while samples(observed)["vllm:request_success_total", "abort"] == before:
        assert time.monotonic() < deadline
    assert samples(observed)["vllm:request_success_total", "abort"] == before + 1


def test_replicas_are_told_by_state_and_by_engine(observed: Observed) -> None:
    found = samples(observed)
    states = {name[1]: value for name, value in found.items() if name[0] == "shardray:replicas"}
    assert states == {"ready": 2, "loading": 0, "failed": 0, "stopping": 0, "recovering": 0}
    assert {name[1] for name in found if name[0] == "vllm:num_requests_waiting"} == {"driver", "0", "1"}
    assert found["shardray:shard_weight_bytes", "cpu", "0", "here", "0", "0"] == 1000


def test_openmetrics_is_answered_to_who_asks_for_it(observed: Observed) -> None:
    answer, text = observed.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert {"vllm:kv_cache_usage_perc", "shardray:calls"} <= {family.name for family in parse_openmetrics(text)}


def test_the_fleet_is_told_as_json(observed: Observed) -> None:
    answer, text = observed.get("/fleet.json")
    told = json.loads(text)
    assert answer.headers["Content-Type"] == "application/json"
    assert [replica["shards"][0]["pid"] for replica in told["fleet"]["replicas"]] == [1, 1]
    assert told["fleet"]["state"] == "ready"
    assert len(told["inter_token_s"]["counts"]) == len(told["inter_token_s"]["bounds"]) + 1


@pytest.mark.parametrize(("path", "kind"), [("/", "html"), ("/page.js", "javascript"), ("/page.css", "css")])
def test_the_page_is_its_own_and_may_load_nothing_else(observed: Observed, path: str, kind: str) -> None:
    answer, text = observed.get(path)
    assert (answer.status, answer.headers["Content-Type"]) == (200, f"text/{kind}; charset=utf-8")
    assert answer.headers["Content-Security-Policy"].startswith(POLICY)
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "says"),
    [
        ("/", "GET", {"Host": "attacker.example"}, 403, "ask for 127.0.0.1 or localhost"),
        ("/metrics", "GET", {"Host": "attacker.example:80"}, 403, "ask for"),
        ("/etc/passwd", "GET", {}, 404, "/fleet.json, /metrics"),
        ("/../web.py", "GET", {}, 404, "there are /"),
        ("/metrics", "POST", {}, 501, "Unsupported method"),
        ("/", "DELETE", {}, 501, "Unsupported method"),
    ],
)
def test_nothing_else_is_answered(
    observed: Observed, path: str, method: str, headers: dict[str, str], status: int, says: str
) -> None:
    answer, text = observed.get(path, method, **headers)
    assert (answer.status, says in text) == (status, True)
    assert "Content-Security-Policy" in answer.headers


@pytest.mark.parametrize("listen", ["127.0.0.2:0", "localhost:0"])
def test_every_loopback_address_refuses_the_names_of_strangers(listen: str) -> None:
    server = WebServer(listen, {"/": lambda accept: ("text/plain", b"here")})
    server.start()
    try:
        for host, status in {"attacker.example": 403, "127.0.0.2:80": 200, "[::1]:80": 200, "localhost": 200}.items():
            connection = http.client.HTTPConnection(*server.address.split(":"))
            connection.request("GET", "/", headers={"Host": host})
            assert connection.getresponse().status == status
            connection.close()
    finally:
        server.stop()


def test_a_query_is_left_out_of_account(observed: Observed) -> None:
    assert observed.get("/?debug=1")[0].status == 200


def test_a_connection_that_says_nothing_or_garbage_holds_up_nobody(observed: Observed) -> None:
    host, _, port = observed.address.partition(":")
    with contextlib.ExitStack() as stack:
        for index in range(20):
            silent = stack.enter_context(socket.create_connection((host, int(port))))
            if index % 2:
                silent.sendall(b"\x16\x03\x01\x00garbage\r\n\r\n")
        began = time.monotonic()
        assert observed.get("/metrics")[0].status == 200
        assert time.monotonic() - began < 5


def test_a_loop_that_hangs_is_unavailable(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardray.runtime.observe.port._ANSWER_S", 0.2)
    may_go_on = threading.Event()
    observed.loop.call_soon_threadsafe(may_go_on.wait, 10)
    answers = [observed.get(path) for path in ("/metrics", "/fleet.json")]
    may_go_on.set()
    assert [(answer.status, text) for answer, text in answers] == [(503, "the driver does not answer\n")] * 2
    assert observed.get("/metrics")[0].status == 200


def test_an_address_that_is_taken_is_named_with_the_key(observed: Observed) -> None:
    with pytest.raises(
        MetricsListenError, match=rf"metrics.listen: cannot listen on {observed.address}: Address .* in"
    ):
        WebServer(observed.address, {})


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "shardray.runtime.observe.extras.find_spec", lambda name: None if name == "prometheus_client" else find(name)
    )
    check_extras(Config(model=ModelSettings(source="stub")))
    config = Config(model=ModelSettings(source="stub"), metrics=MetricsSettings(listen="127.0.0.1:0"))
    with pytest.raises(
        MissingExtraError, match=r"metrics.listen: .* prometheus-client, .* pip install 'shardray\[metr"
    ):
        check_extras(config)


def test_the_command_tells_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shardray.runtime.observe.extras.find_spec", lambda name: None)
    options = ["--set", "model.source=/nowhere", "--set", "metrics.listen=127.0.0.1:0"]
    assert run(["serve", *options]) == 2
    assert capsys.readouterr().err.startswith("error: metrics.listen: 127.0.0.1:0 needs the package prometheus-client")


def test_the_port_is_closed_in_the_end() -> None:
    server = WebServer("127.0.0.1:0", {"/": lambda accept: ("text/plain", b"here")})
    server.start()
    host, _, port = server.address.partition(":")
    socket.create_connection((host, int(port))).close()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(_connect(host, int(port)))


async def _connect(host: str, port: int) -> None:
    await asyncio.open_connection(host, port)
