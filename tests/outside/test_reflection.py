"""grpcurl and `buf curl`, which have no proto of ours and ask the server for it: list, describe, and generate."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardray.runtime.client import Client
from tests.outside.conftest import TOKEN, Guarded
from tests.serving import Serving

SERVICE = "shardray.v1.InferenceService"
GENERATE = f"{SERVICE}/Generate"
PROMPT = "The capital of France is"
GREEDY = json.dumps({"text": PROMPT, "sampling": {"temperature": 0, "max_tokens": 8}})
BEARER = f"authorization: Bearer {TOKEN}"


def run(tool: str, *arguments: str) -> str:
    """What the tool of this environment prints."""
    done = call(tool, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def messages(output: str) -> Iterator[dict[str, Any]]:
    """Of JSON objects, one behind the other."""
    decoder, output = json.JSONDecoder(), output.strip()
    while output:
        message, end = decoder.raw_decode(output)
        yield message
        output = output[end:].lstrip()


def text_of(output: str) -> str:
    return "".join(message.get("text", "") for message in messages(output))


def test_grpcurl_lists_describes_and_streams_the_text_of_our_own_client(smollm2: Serving, native: Client) -> None:
    services = run("grpcurl", "-plaintext", smollm2.address, "list").split()
    assert set(services) == {
        SERVICE, "shardray.v1.ControlService", "inference.GRPCInferenceService", "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }  # fmt: skip
    described = run("grpcurl", "-plaintext", smollm2.address, "describe", "shardray.v1.SamplingParameters")
    assert "optional double temperature = 1;" in described
    output = run("grpcurl", "-plaintext", "-d", GREEDY, smollm2.address, GENERATE)
    assert text_of(output) == native.generate(PROMPT, temperature=0, max_tokens=8).text
    assert len(list(messages(output))) > 3
    health = run("grpcurl", "-plaintext", smollm2.address, "grpc.health.v1.Health/Check")
    assert json.loads(health) == {"status": "SERVING"}


def test_grpcurl_is_told_which_field_is_bad(smollm2: Serving) -> None:
    bad = json.dumps({"text": PROMPT, "sampling": {"temperature": -1}})
    done = call("grpcurl", "-plaintext", "-d", bad, smollm2.address, GENERATE)
    assert done.returncode != 0
    assert "Code: InvalidArgument" in done.stderr
    assert "sampling.temperature" in done.stderr


def test_grpcurl_speaks_to_the_open_inference_protocol_in_typed_contents(smollm2: Serving, native: Client) -> None:
    data = {"bytes_contents": ["VGhlIGNhcGl0YWwgb2YgRnJhbmNlIGlz"]}  # the prompt in base64
    request = {
        "model_name": "stub",
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": data}],
        "parameters": {"max_tokens": {"int64_param": 8}, "temperature": {"double_param": 0}},
    }
    method = "inference.GRPCInferenceService/ModelInfer"
    answer = json.loads(run("grpcurl", "-plaintext", "-d", json.dumps(request), smollm2.address, method))
    (encoded,) = answer["outputs"][0]["contents"]["bytes_contents"]
    text = native.generate(PROMPT, temperature=0, max_tokens=8).text
    assert text in base64.b64decode(encoded).decode()


def test_buf_curl_lists_and_streams_the_text_of_our_own_client(smollm2: Serving, native: Client) -> None:
    url = f"http://{smollm2.address}"
    services = run("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-services", url).split()
    assert SERVICE in services
    output = run("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", GREEDY, f"{url}/{GENERATE}")
    assert text_of(output) == native.generate(PROMPT, temperature=0, max_tokens=8).text


def test_behind_tls_and_tokens_both_tools_generate_and_are_refused_without_a_token(guarded: Guarded) -> None:
    request = json.dumps({"text": "abc", "sampling": {"max_tokens": 7}})
    grpcurl = ("-cacert", guarded.ca)
    assert SERVICE in run("grpcurl", *grpcurl, "-H", BEARER, guarded.address, "list")
    assert text_of(run("grpcurl", *grpcurl, "-H", BEARER, "-d", request, guarded.address, GENERATE)) == "abcabca"
    assert "Unauthenticated" in call("grpcurl", *grpcurl, guarded.address, "list").stderr
    buf = ("curl", "--protocol", "grpc", "--cacert", guarded.ca, "-d", request)
    url = f"https://{guarded.address}/{GENERATE}"
    assert text_of(run("buf", *buf, "-H", BEARER, "--reflect-header", "*", url)) == "abcabca"
    assert "unauthenticated" in call("buf", *buf, "--reflect-header", BEARER, url).stderr
