"""tritonclient, sync and aio: the same greedy text and tokens as from our own client, in every style of settings."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from shardray.runtime.client import Client
from shardray.runtime.client.results import Completion
from tests.outside.conftest import TOKEN, Guarded
from tests.outside.triton import is_final, tensor, text_of
from tests.serving import Serving, eventually

MODEL = "stub"
PROMPT = "The capital of France is"
NUM_TOKENS = 8
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
TritonClient = tritonclient.grpc.InferenceServerClient


@pytest.fixture(scope="module")
def triton(smollm2: Serving) -> Iterator[TritonClient]:
    with TritonClient(smollm2.address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(native: Client) -> Completion:
    return native.generate(PROMPT, temperature=0, max_tokens=NUM_TOKENS)


def greedy_inputs(style: str) -> tuple[list[InferInput], dict[str, Any]]:
    """The prompt, and the settings as inputs or as parameters of the request."""
    prompt = tensor("text_input", "BYTES", PROMPT)
    match style:
        case "parameters":
            return [prompt], dict(GREEDY)
        case "tensors":  # as clients of the TensorRT-LLM backend do
            numbers = [tensor("temperature", "FP32", 0.0), tensor("max_tokens", "INT32", NUM_TOKENS)]
            return [prompt, *numbers, tensor("beam_width", "INT32", 1), tensor("stop_words", "BYTES", "")], {}
        case "json":  # as the sample of the vLLM backend does, numbers as texts included, and here twice
            settings = {name: str(value) for name, value in GREEDY.items()}
            return [prompt, tensor("sampling_parameters", "BYTES", json.dumps(settings))], settings
    raise AssertionError(style)


@pytest.mark.parametrize("style", ["parameters", "tensors", "json"])
def test_settings_in_each_style_give_the_greedy_text_of_our_own_client(
    style: str, triton: TritonClient, expected: Completion
) -> None:
    inputs, parameters = greedy_inputs(style)
    result = triton.infer(MODEL, inputs, request_id="mine", parameters=parameters)
    assert (text_of(result), result.get_response().id) == (expected.text, "mine")
    assert "Paris" in expected.text


def test_outputs_that_are_asked_for_by_name_or_by_input_come_back(triton: TritonClient, expected: Completion) -> None:
    inputs, parameters = greedy_inputs("parameters")
    named = [InferRequestedOutput(name) for name in ("text_output", "output_ids", "cumulative_logprob")]
    result = triton.infer(
        MODEL,
        [*inputs, tensor("return_num_input_tokens", "BOOL", True), tensor("return_finish_reason", "BOOL", True)],
        outputs=named,
        parameters=parameters,
    )
    assert result.as_numpy("output_ids").tolist() == list(expected.token_ids)
    assert result.as_numpy("num_input_tokens").tolist() == [expected.usage.num_prompt_tokens]
    assert result.as_numpy("finish_reason").tolist() == [b"length"]
    assert -30 < result.as_numpy("cumulative_logprob")[0] < 0
    assert result.as_numpy("num_output_tokens") is None, "nobody asked"


def test_a_stream_of_the_blocking_client_has_a_delta_a_response_and_a_final_one(
    triton: TritonClient, expected: Completion
) -> None:
    answers: queue.Queue[tuple[InferResult | None, InferenceServerException | None]] = queue.Queue()
    inputs, parameters = greedy_inputs("parameters")
    triton.start_stream(callback=lambda result, error: answers.put((result, error)))
    for request_id in ("a", "b"):
        triton.async_stream_infer(
            MODEL,
            [*inputs, tensor("stream", "BOOL", True)],
            request_id=request_id,
            parameters=parameters,
            enable_empty_final_response=True,
        )
    triton.stop_stream()  # waits for the ends
    found: dict[str, list[InferResult]] = {"a": [], "b": []}
    while not answers.empty():
        result, error = answers.get()
        assert error is None
        assert result is not None
        found[result.get_response().id].append(result)
    for results in found.values():
        assert "".join(map(text_of, results)) == expected.text
        assert len(results) > 3
        assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]


@pytest.mark.asyncio
async def test_the_aio_client_streams_and_a_request_without_stream_has_one_response(
    smollm2: Serving, expected: Completion
) -> None:
    inputs, parameters = greedy_inputs("json")

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for request_id, streams in (("whole", False), ("deltas", True)):
            flag = tensor("stream", "BOOL", streams)
            yield {"model_name": MODEL, "inputs": [*inputs, flag], "request_id": request_id, "parameters": parameters}

    found: dict[str, list[str]] = {"whole": [], "deltas": []}
    async with tritonclient.grpc.aio.InferenceServerClient(smollm2.address) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            found[result.get_response().id].append(text_of(result))
    assert found["whole"] == [expected.text] == ["".join(found["deltas"])]
    assert len(found["deltas"]) > 3


def test_a_schema_is_kept_in_each_style(triton: TritonClient, native: Client) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    wanted = native.generate(PROMPT, temperature=0, max_tokens=60, json_schema=schema)
    assert isinstance(json.loads(wanted.text)["n"], int)
    prompt, as_text = tensor("text_input", "BYTES", PROMPT), json.dumps(schema)
    settings = {"temperature": 0.0, "max_tokens": 60}
    for inputs, parameters in (
        ([prompt], {**settings, "json_schema": as_text}),
        ([prompt, tensor("json_schema", "BYTES", as_text)], settings),
        ([prompt, tensor("sampling_parameters", "BYTES", json.dumps({**settings, "json_schema": schema}))], {}),
    ):
        assert text_of(triton.infer(MODEL, inputs, parameters=parameters)) == wanted.text


def test_seeded_sampling_and_stop_strings_mean_what_they_mean_to_our_own_client(
    triton: TritonClient, native: Client
) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2**63 + 5, "max_tokens": 12}
    wanted = native.generate(PROMPT, **settings, stop=["."])
    result = triton.infer(
        MODEL,
        [
            tensor("text_input", "BYTES", PROMPT),
            tensor("temperature", "FP32", settings["temperature"]),
            tensor("random_seed", "UINT64", settings["seed"]),
            tensor("stop_words", "BYTES", ".", ""),
        ],
        parameters={name: value for name, value in settings.items() if name not in ("temperature", "seed")},
    )
    assert text_of(result) == wanted.text


def test_the_prompt_stands_before_the_output_if_that_is_asked_for(triton: TritonClient, expected: Completion) -> None:
    inputs, parameters = greedy_inputs("parameters")
    included = tensor("exclude_input_in_output", "BOOL", False)
    assert text_of(triton.infer(MODEL, [*inputs, included], parameters=parameters)) == PROMPT + expected.text


def test_a_stream_that_the_client_cancels_frees_its_requests(smollm2: Serving, triton: TritonClient) -> None:
    came = threading.Event()
    triton.start_stream(callback=lambda result, error: came.set())
    prompt = [tensor("text_input", "BYTES", PROMPT), tensor("stream", "BOOL", True)]
    for _ in range(2):
        triton.async_stream_infer(MODEL, prompt, parameters={"max_tokens": 400, "ignore_eos": True})
    assert came.wait(20)
    triton.stop_stream(cancel_requests=True)

    def idle() -> bool:
        fleet = smollm2.driver.fleet.snapshot()
        return fleet.num_live_requests == 0 and fleet.replicas[0].stats.num_used_pages == 0

    asyncio.run(eventually(idle))


def test_refusals_have_their_codes(triton: TritonClient) -> None:
    prompt = tensor("text_input", "BYTES", PROMPT)
    for model, parameters, code, message in (
        ("another", {}, "NOT_FOUND", "model 'another' is not served here; stub is"),
        (MODEL, {"max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens: -1 is no whole number"),
        (MODEL, {"max_tokens": 100_000}, "INVALID_ARGUMENT", "max_tokens: the prompt has 5 tokens"),
    ):
        with pytest.raises(InferenceServerException, match=message) as caught:
            triton.infer(model, [prompt], parameters=parameters)
        assert caught.value.status() == f"StatusCode.{code}"


def test_behind_tls_and_tokens_it_generates_and_is_refused_without_a_token(guarded: Guarded) -> None:
    prompt = tensor("text_input", "BYTES", "abc")
    with TritonClient(guarded.address, ssl=True, root_certificates=guarded.ca) as client:
        shown = {"authorization": f"Bearer {TOKEN}"}
        assert text_of(client.infer(MODEL, [prompt], parameters={"max_tokens": 7}, headers=shown)) == "abcabca"
        with pytest.raises(InferenceServerException, match="a token is asked for"):
            client.infer(MODEL, [prompt])


def test_the_server_and_its_model_are_ready_and_described(triton: TritonClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(MODEL)
    assert not triton.is_model_ready("another")
    assert triton.get_server_metadata().name == "shardray"
    metadata = triton.get_model_metadata(MODEL)
    assert {one.name for one in metadata.inputs} >= {"text_input", "stream", "sampling_parameters", "max_tokens"}
    config = triton.get_model_config(MODEL).config
    assert config.model_transaction_policy.decoupled
    assert [one.name for one in config.input if not one.optional] == ["text_input"]
    index = triton.get_model_repository_index()
    assert [(one.name, one.state) for one in index.models] == [(MODEL, "READY")]
