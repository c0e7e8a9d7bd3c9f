"""The server that the front door's benchmark loads: a driver over a stub engine, in a process and on a core of its own.

Prints its port, then runs until it is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from shardray.runtime.config import GrpcSettings, LimitsSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.model.sources import resolve_model
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.loop import run, settle
from shardray.runtime.server.server import Server
from tests.stub_replica import SECRET


async def serve(model: str, replica: str, max_num_seqs: int, max_queued: int) -> None:
    """Until cancelled; the tokenizer of ``model`` makes text of what the stub engine repeats."""
    limits = LimitsSettings(max_queued_requests=max_queued)
    driver = Driver("stub", Tokenizer.load(Path(resolve_model(model))), limits, max_num_seqs)
    server = Server(GrpcSettings(listen="127.0.0.1:0"), driver)
    port = await server.start()
    await driver.attach(0, replica, SECRET, ())
    settle()  # as ``serve`` does
    print(port, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--replica", required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-queued", type=int, required=True)
    parser.add_argument("--core", type=int, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    run(serve(options.model, options.replica, options.max_num_seqs, options.max_queued))


if __name__ == "__main__":
    main()
