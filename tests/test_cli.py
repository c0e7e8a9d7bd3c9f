"""The command line as a user meets it: real processes, what they print, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardray import __version__
from shardray.runtime.cli.app import run
from shardray.runtime.cli.json_messages import to_jsonable
from shardray.runtime.cli.shard_table import format_bytes
from shardray.runtime.config import config_schema
from shardray.v1 import control_pb2, inference_pb2

COMMANDS = (
    "pull",
    "quantize",
    "plan",
    "serve",
    "generate",
    "chat",
    "status",
    "scale",
    "reload",
    "restart",
    "drain",
    "schema",
    "demo",
    "doctor",
    "trace",
    "render",
)
HEAVY = ("torch", "ray", "grpc", "tokenizers", "pydantic.dataclasses")


def shardray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command() -> None:
    done = shardray("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Usage: shardray {command}" in capsys.readouterr().out


def test_help_loads_no_heavy_library() -> None:
    check = f"import sys, shardray.runtime.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_of_it() -> None:
    check = "import sys, shardray; print([name for name in sys.modules if name.startswith('shardray.')])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"shardray {__version__}\n"


def test_schema_prints_the_schema_of_the_settings() -> None:
    done = shardray("schema")
    assert (done.returncode, json.loads(done.stdout)) == (0, config_schema())


def test_a_bad_file_is_refused_line_by_line_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: {source: smollm2-135m}\nparallel: {tensor_paralel_size: 2}\nengine: {block_size: 0}\n")
    done = shardray("serve", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: {path}: parallel.tensor_paralel_size: unknown key (value 2); "
        "did you mean parallel.tensor_parallel_size?",
        f"error: {path}: engine.block_size: 0 is not accepted; give an integer of at least 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["serve", "absent.yaml"], 2, "error: absent.yaml: cannot be read: No such file or directory"),
        (["serve", "--set", "model.source"], 2, "error: --set: 'model.source' is not key=value, for example"),
        (["serve", "--sett", "a=b"], 2, "error: No such option: --sett"),
        (["serf"], 2, "error: No such command 'serf'"),
        (["generate"], 2, "error: Missing argument 'text'"),
        (["generate", "hi", "--max-tokens", "many"], 2, "error: Invalid value for '--max-tokens'"),
        (["pull", "smollm"], 2, "error: 'smollm': unknown model, did you mean smollm2-135m?"),
        (["quantize", "smollm2-135m", "."], 2, "error: .: is there already; name a folder that is not"),
        (["quantize", "smollm", "absent"], 2, "error: 'smollm': unknown model, did you mean smollm2-135m?"),
        (["status", "--server", "127.0.0.1:1"], 1, "error: no answer from 127.0.0.1:1"),
        (["generate", "hi", "--server", "127.0.0.1:1"], 1, "error: no answer from 127.0.0.1:1"),
    ],
)
def test_an_error_is_one_line_with_the_fix(
    arguments: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected)
    assert captured.err.count("\n") == 1


def test_debug_shows_where_an_error_came_from() -> None:
    done = shardray("--debug", "serve", "absent.yaml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_json_keeps_numbers_as_numbers_and_tells_states_in_words() -> None:
    shard = control_pb2.Shard(rank=1, host="10.0.0.1", weight_bytes=2**40)
    fleet = control_pb2.Fleet(
        state=control_pb2.FLEET_STATE_READY, replicas=[control_pb2.Replica(progress=1.0, shards=[shard])]
    )
    fleet.start_time.FromSeconds(0)
    plain = to_jsonable(fleet)
    assert (plain["state"], plain["start_time"]) == ("ready", "1970-01-01T00:00:00Z")
    assert plain["replicas"][0]["shards"][0]["weight_bytes"] == 2**40
    assert plain["replicas"][0]["state"] == "unspecified"
    assert json.loads(json.dumps(plain)) == plain


def test_json_leaves_out_what_is_not_set_where_zero_means_something() -> None:
    assert "time_to_first_token_s" not in to_jsonable(inference_pb2.Timing(total_s=1.0))
    assert to_jsonable(inference_pb2.Timing(time_to_first_token_s=0.0))["time_to_first_token_s"] == 0.0


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (256 << 20, "256 MiB"), (3 << 40, "3 TiB")]
)
def test_sizes_are_short_to_read(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
