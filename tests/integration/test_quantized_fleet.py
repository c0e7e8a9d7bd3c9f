"""The demo model in 8 bits, served by two ranks: one dies, and the stream goes on as it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from shardray import Client
from tests.command import Command, shardray

pytestmark = pytest.mark.integration
PROMPT, NUM_TOKENS = "The three laws of robotics are", 160


def test_a_quantized_model_is_served_and_survives_a_rank(tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    told = json.loads(shardray("quantize", "smollm2-135m", str(folder), "--json"))
    assert (
        0.5 < told["num_bytes"] / told["num_bytes_before"] < 0.75
    )  # the embedding stays, and the head is one of its own
    settings = [
        f"model.source={folder}", "model.max_model_len=512", "engine.kv_memory_bytes=64MiB", "grpc.listen=127.0.0.1:0",
        "parallel.tensor_parallel_size=2", "cluster.spares=1",
    ]  # fmt: skip
    command = Command(("serve", "--json", *(word for setting in settings for word in ("--set", setting))))
    try:
        event = command.until_event("serving")
        with Client(event["address"], timeout_s=120) as client:
            sampling = {"max_tokens": NUM_TOKENS, "temperature": 0.7, "seed": 5, "ignore_eos": True}
            undisturbed = client.generate(PROMPT, **sampling).token_ids
            found: list[int] = []
            for delta in client.stream(PROMPT, **sampling):
                if len(found) < 40 <= len(found) + len(delta.token_ids):
                    os.kill(event["shards"][1]["pid"], signal.SIGKILL)
                found += delta.token_ids
    finally:
        command.process.terminate()
        command.process.communicate(timeout=60)
    assert len(found) == NUM_TOKENS
    assert found == undisturbed
    assert command.left_behind() == []
