"""The blocking client, beside a server in another thread; and what both clients check themselves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from shardray.runtime.client import Client, Prompt, ServerError
from shardray.runtime.client.requests import SamplingOptions, embed_request, generate_request
from shardray.runtime.engine.request import FinishReason
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import serving


@pytest.fixture(scope="module")
def address(tokenizer: Tokenizer) -> Iterator[str]:
    """A server in the loop of another thread."""
    addresses: list[str] = []
    started, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(tokenizer, step_time_s=0.005) as up:
            addresses.append(up.address)
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait(20)
    yield addresses[0]
    ended.set()
    thread.join()


def test_the_blocking_client_speaks_to_every_method(address: str, tokenizer: Tokenizer) -> None:
    with Client(address, timeout_s=30) as client:
        client.wait_ready(timeout_s=10)
        answer = client.generate("abc", max_tokens=4, temperature=0)
        assert (answer.text, answer.finish_reason) == ("abca", FinishReason.LENGTH)
        assert "".join(delta.text for delta in client.stream("abc", max_tokens=4)) == "abca"
        assert client.tokenize("abc") == tokenizer.encode("abc")
        assert client.detokenize(tokenizer.encode("abc")) == "abc"
        assert client.model().model_id == "stub"
        assert client.abort("unknown") is False
        assert client.fleet().model_id == "stub"
        watch = client.watch_fleet()
        assert next(watch).model_id == "stub"


def test_an_iterator_that_is_left_ends_its_generation(address: str) -> None:
    with Client(address) as client:
        for _ in client.stream("abc", max_tokens=400, request_id="left"):
            break
        assert client.generate("abc", max_tokens=1, request_id="left").text == "a"


def test_a_server_that_is_not_there_is_one_line_with_the_fix() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(ServerError, match=r"no answer from 127\.0\.0\.1:1") as caught:
        client.generate("abc")
    assert "\n" not in str(caught.value)
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("field", "prompt", "options"),
    [
        ("top_k", "a", {"top_k": -1}),
        ("seed", "a", {"seed": 2**64}),
        ("temperature", "a", {"temperature": "hot"}),
        ("stop", "a", {"stop": "a single string"}),
        ("logit_bias", "a", {"logit_bias": {-1: 1.0}}),
        ("ids", [-1], {}),
        ("chat.messages[0].content", [{"role": "user"}], {}),
    ],
)
def test_a_value_that_no_message_holds_is_refused_by_name(field: str, prompt: Prompt, options: object) -> None:
    with pytest.raises(ServerError) as caught:
        generate_request(prompt, "", 0, options)  # type: ignore[arg-type]
    assert caught.value.code == "INVALID_ARGUMENT"
    assert list(caught.value.fields) == [field]


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'temprature'.*temperature"):
        generate_request("a", "", 0, {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


def test_options_that_are_none_are_left_to_the_server() -> None:
    unset = dict.fromkeys(SamplingOptions.__annotations__)
    assert generate_request("a", "", 0, unset) == generate_request("a", "", 0, {})  # type: ignore[arg-type]
    assert embed_request(["a"], {"pooling": None, "normalize": None}) == embed_request(["a"], {})
    request = generate_request("a", "", 0, {"seed": None, "max_tokens": None, "temperature": 0.0})
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("max_tokens")
    assert request.sampling.HasField("temperature")


def test_the_client_loads_neither_torch_nor_ray() -> None:
    code = "import sys, shardray.runtime.client; assert not {'torch', 'ray', 'tokenizers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
