"""JSON that fits a schema, out of a fleet of two tensor ranks whose sampler is killed while it writes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shardray import Client
from tests.command import Command, shardray

pytestmark = pytest.mark.integration
PROMPT = "People who sailed around the world, as JSON:\n"
SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 24}, "year": {"type": "integer"}},
        "required": ["name", "year"],
        "additionalProperties": False,
    },
    "minItems": 7,
    "maxItems": 9,
}


def test_a_stream_goes_on_in_its_grammar_when_the_rank_that_samples_is_lost(tmp_path: Path) -> None:
    settings = [
        "model.source=smollm2-135m", "model.dtype=float32", "model.max_model_len=1024", "engine.kv_memory_bytes=96MiB",
        "grpc.listen=127.0.0.1:0", "parallel.tensor_parallel_size=2", "cluster.spares=1",
    ]  # fmt: skip
    command = Command(("serve", "--json", *(word for setting in settings for word in ("--set", setting))))
    try:
        event = command.until_event("serving")
        sampling: dict[str, Any] = {"max_tokens": 600, "temperature": 0.7, "seed": 11, "json_schema": SCHEMA}
        with Client(event["address"], timeout_s=120) as client:
            undisturbed = client.generate(PROMPT, **sampling)
            found: list[int] = []
            for delta in client.stream(PROMPT, **sampling):
                if len(found) < 40 <= len(found) + len(delta.token_ids):
                    os.kill(event["shards"][0]["pid"], signal.SIGKILL)
                found += delta.token_ids
        schema_file = tmp_path / "schema.json"
        schema_file.write_text(json.dumps(SCHEMA))
        options = ("--max-tokens", "600", "--temperature", "0.7", "--seed", "11", "--json-schema", f"@{schema_file}")
        printed = shardray("generate", PROMPT, "--server", event["address"], *options)
    finally:
        command.process.terminate()
        command.process.communicate(timeout=60)
    assert found == list(undisturbed.token_ids)
    assert undisturbed.finish_reason == "stop"
    jsonschema.validate(json.loads(undisturbed.text), SCHEMA)
    assert printed == undisturbed.text + "\n"
    assert command.left_behind() == []
