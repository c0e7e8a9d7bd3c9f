"""The commands as processes on a tiny model: what they print, and that they leave no process behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shardray import SamplingParams
from tests.beam_reference import beam_search
from tests.command import Command, shardray
from tests.stub_tokenizer import EOS_ID, write_tokenizer
from tests.tiny_models import Reference, save_llama

pytestmark = pytest.mark.integration

PROMPT = "The capital of France"
NUM_TOKENS = 12
SETTINGS = ("model.max_model_len=256", "model.dtype=float32", "engine.kv_memory_bytes=4MiB", "engine.max_num_seqs=4")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("tiny"), vocab_size=EOS_ID + 1, eos_token_id=EOS_ID)
    return write_tokenizer(folder, keep_config=True)


def settings(folder: Path, *more: str) -> list[str]:
    return [argument for setting in (f"model.source={folder}", *SETTINGS, *more) for argument in ("--set", setting)]


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    """A fleet of two tensor ranks; afterwards, that SIGTERM ends it cleanly."""
    overrides = settings(model_folder, "grpc.listen=127.0.0.1:0", "parallel.tensor_parallel_size=2")
    command = Command(("serve", "--json", *overrides))
    event = command.until_event("serving")
    assert [shard["rank"] for shard in event["shards"]] == [0, 1]
    yield event["address"]
    command.process.terminate()
    _, stderr = command.process.communicate(timeout=60)
    assert (command.process.returncode, stderr) == (0, "")
    assert command.left_behind() == []


def generate(address: str, *arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    options = ("--server", address, "--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--ignore-eos", "--json")
    return [json.loads(line) for line in shardray("generate", *arguments, *options, stdin=stdin).splitlines()]


def test_generate_gives_the_tokens_of_transformers(address: str, model_folder: Path) -> None:
    lines = generate(address, PROMPT, "--logprobs", "2")
    token_ids = [token_id for line in lines for token_id in line["token_ids"]]
    prompt_ids = _encode(model_folder, PROMPT)
    assert token_ids == Reference(model_folder).greedy(prompt_ids, NUM_TOKENS)
    positions = [position for line in lines for position in line["logprobs"]]
    assert [position["chosen"]["token_id"] for position in positions] == token_ids
    assert all(len(position["top"]) == 2 for position in positions)
    last = lines[-1]
    assert last["finish_reason"] == "length"
    assert last["usage"] == {
        "num_prompt_tokens": len(prompt_ids),
        "num_output_tokens": NUM_TOKENS,
        "num_cached_prompt_tokens": 0,
    }
    assert last["timing"]["total_s"] > 0
    assert "seed" in lines[0]


def test_generate_reads_a_prompt_from_stdin(address: str) -> None:
    piped, given = generate(address, "-", stdin=PROMPT), generate(address, PROMPT)
    assert "".join(line["text"] for line in piped) == "".join(line["text"] for line in given)


def test_generate_streams_plain_text_and_ends_the_line(address: str) -> None:
    options = ("--server", address, "--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--ignore-eos")
    text = "".join(line["text"] for line in generate(address, PROMPT))
    assert shardray("generate", PROMPT, *options) == text + "\n"


def test_generate_searches_with_beams(address: str, model_folder: Path) -> None:
    params = SamplingParams(
        num_beams=3, max_tokens=NUM_TOKENS, length_penalty=2.0, early_stopping=True, ignore_eos=True
    )
    options = ("--num-beams", "3", "--length-penalty", "2", "--early-stopping")
    token_ids = [token_id for line in generate(address, PROMPT, *options) for token_id in line["token_ids"]]
    assert token_ids == beam_search(Reference(model_folder).model, _encode(model_folder, PROMPT), params)


def test_a_value_out_of_range_is_refused_by_name(address: str) -> None:
    command = [sys.executable, "-m", "shardray", "generate", PROMPT, "--server", address, "--top-p", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "top_p" in done.stderr
    assert done.stderr.count("\n") == 1


def test_chat_remembers_what_was_said_until_it_is_reset(address: str) -> None:
    options = ("--server", address, "--temperature", "0", "--max-tokens", "4")
    first, second, fresh = shardray("chat", *options, stdin="Hello\nHello\n/reset\nHello\n").split("\n")[:3]
    assert first == fresh
    assert second != first


def test_status_shows_who_holds_what(address: str) -> None:
    fleet = json.loads(shardray("status", "--server", address, "--json"))
    assert fleet["state"] == "ready"
    shards = fleet["replicas"][0]["shards"]
    assert [(shard["stage"], shard["tp_rank"], shard["num_layers"]) for shard in shards] == [(0, 0, 5), (0, 1, 5)]
    assert sum(shard["num_heads"] for shard in shards) == 9
    assert all(psutil.pid_exists(shard["pid"]) for shard in shards)
    text = shardray("status", "--server", address)
    assert "ready" in text
    assert all(str(shard["pid"]) in text for shard in shards)


def test_a_second_server_on_the_same_port_is_refused_with_the_way_out(address: str, model_folder: Path) -> None:
    command = Command(("serve", *settings(model_folder, f"grpc.listen={address}")))
    _, stderr = command.process.communicate(timeout=60)
    assert command.process.returncode == 1
    assert f"grpc.listen: cannot listen on {address}" in stderr
    assert command.left_behind() == []


def test_a_form_that_fails_is_told_in_a_line_and_leaves_nothing(model_folder: Path) -> None:
    command = Command(("serve", *settings(model_folder, "grpc.listen=127.0.0.1:0", "model.max_model_len=99999")))
    _, stderr = command.process.communicate(timeout=120)
    assert command.process.returncode == 1
    assert "99999" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert command.left_behind() == []


@pytest.mark.parametrize("event", ["listening", "loading"])
def test_ctrl_c_while_it_comes_up_leaves_nothing(model_folder: Path, event: str) -> None:
    command = Command(("serve", "--json", *settings(model_folder, "grpc.listen=127.0.0.1:0")))
    command.until_event(event)
    command.interrupt()
    command.process.communicate(timeout=90)
    assert command.process.returncode == 0
    assert command.left_behind() == []


def test_the_demo_serves_asks_and_stops(model_folder: Path) -> None:
    command = Command(("demo", "How are you?", "--max-tokens", "8", *settings(model_folder)))
    stdout, stderr = command.process.communicate(timeout=120)
    assert (command.process.returncode, stderr.strip()) == (0, "")
    assert "SERVING" in stdout
    assert "> How are you?" in stdout
    assert stdout.endswith("Stopped.\n")
    assert command.left_behind() == []


def _encode(folder: Path, text: str) -> tuple[int, ...]:
    from shardray.runtime.model.tokenizer import Tokenizer

    return tuple(Tokenizer.load(folder).encode(text))
