"""``python -m tests.outside.load``: k6 against a server with stub engines, so that the front door is what is loaded."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shardray.runtime.config import LimitsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import Serving, in_thread, serving
from tests.stub_tokenizer import write_tokenizer

SCRIPT = Path(__file__).with_name("load.js")
STEP_TIME_S = 0.02


@contextlib.contextmanager
def paced(folder: Path, num_streams: int) -> Iterator[Serving]:
    """A server whose streams have a token every ``STEP_TIME_S`` seconds."""
    tokenizer = Tokenizer.load(write_tokenizer(folder))
    limits = LimitsSettings(max_queued_requests=2 * num_streams)
    with in_thread(serving(tokenizer, max_num_seqs=num_streams, limits=limits, step_time_s=STEP_TIME_S)) as up:
        yield up


def k6(address: str, **settings: float | str) -> subprocess.CompletedProcess[str]:
    """Run the script; ``settings`` are those that it names, in any case of letters."""
    named = [f"--env={name.upper()}={value}" for name, value in {"address": address, **settings}.items()]
    command = [Path(sys.executable).with_name("k6"), "run", "--quiet", "--no-color", *named, SCRIPT]
    environment = {**os.environ, "K6_NO_USAGE_REPORT": "true"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def main(
    seconds: Annotated[float, typer.Option(help="How long new streams are begun.")] = 60.0,
    streams: Annotated[int, typer.Option(help="Clients at once, each with a connection of its own.")] = 64,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a server that runs; unset: one is started.")] = None,
) -> None:
    """Load a server; exit code 99 if a threshold of tests/outside/load.js is crossed."""
    with contextlib.ExitStack() as stack:
        if address is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            address = stack.enter_context(paced(folder, streams)).address
        done = k6(address, streams=streams, duration=f"{seconds}s")
    print(done.stdout, done.stderr, sep="")
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    typer.run(main)
