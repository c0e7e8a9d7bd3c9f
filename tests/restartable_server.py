"""A driver with its server as a process of its own, over replicas that outlive it: it can be started again."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

from shardray.runtime.config import GrpcSettings, LimitsSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.journal import Journal, MemoryJournal
from shardray.runtime.driver.journal_file import JournalError
from shardray.runtime.driver.sqlite_journal import SqliteJournal
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.server.server import Server
from tests.serving import SHARD
from tests.stub_replica import SECRET

_ROOT = Path(__file__).resolve().parent.parent


class RestartableServer:
    """Always at the same address. Without ``journal`` requests are kept in memory."""

    def __init__(self, tokenizer: Path, replicas: list[str], journal: Path | None, max_num_seqs: int = 8) -> None:
        self._options = [f"--tokenizer={tokenizer}", f"--max-num-seqs={max_num_seqs}"]
        self._options += [f"--replica={address}" for address in replicas]
        self._options += [f"--journal={journal}"] if journal is not None else []
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.restartable_server", f"--port={self._port}", *self._options]
        self.process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self._port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """As an operator does."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


async def _serve(options: argparse.Namespace) -> None:
    journal: Journal = MemoryJournal() if options.journal is None else SqliteJournal(options.journal, "stub")
    limits = LimitsSettings(max_queued_requests=1000)
    driver = Driver("stub", Tokenizer.load(options.tokenizer), limits, options.max_num_seqs, journal)
    driver.restore()
    server = Server(GrpcSettings(listen=f"127.0.0.1:{options.port}"), driver)
    port = await server.start()
    for replica_id, address in enumerate(options.replica):
        await driver.attach(replica_id, address, SECRET, [SHARD])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(port, flush=True)
    await stop.wait()
    await server.stop(0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--replica", action="append", default=[])
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(_serve(parser.parse_args()))
        except JournalError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
