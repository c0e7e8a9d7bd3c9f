"""A replica as a process of its own: the leader's server around a stub engine. Prints its port, runs until killed."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

from shardray.parallel.credentials import Credentials
from shardray.runtime.cluster.leader import LeaderServer
from tests.stub_engine import STUB_MODEL, StubEngine

SECRET = Credentials("e", "a secret of the mesh")
_ROOT = Path(__file__).resolve().parent.parent


class ReplicaProcess:
    """A module of the tests that prints the port of its leader."""

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def kill(self) -> None:
        """As the kernel would: SIGKILL."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class StubReplica(ReplicaProcess):
    """Options are those of ``main``, with underscores."""

    def __init__(self, **options: float) -> None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        super().__init__("tests.stub_replica", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-time-s", type=float, default=0.0)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--num-kv-tokens", type=int, default=4096)
    parser.add_argument("--fail-after-steps", type=int)
    parser.add_argument("--poison-id", type=int)
    parser.add_argument("--poison-position", type=int, default=0)
    options = parser.parse_args()
    model = dataclasses.replace(STUB_MODEL, max_model_len=options.max_model_len, num_kv_tokens=options.num_kv_tokens)
    engine = StubEngine(
        options.step_time_s,
        options.max_num_seqs,
        model,
        options.fail_after_steps,
        options.poison_id,
        options.poison_position,
    )
    server = LeaderServer()
    print(server.start("127.0.0.1", engine, SECRET), flush=True)
    try:
        engine.run(server.publish)
    except RuntimeError as error:
        server.stop(str(error))


if __name__ == "__main__":
    main()
