"""A Ray of its own on this machine, as an operator would have it running. Prints its address; ends with its input."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_STORE_BYTES = 80 << 20


@contextlib.contextmanager
def running_ray(num_cpus: int = 8) -> Iterator[str]:
    """Its address, for RAY_ADDRESS."""
    command = [sys.executable, "-m", "benchmarks.ray_head", str(num_cpus)]
    head = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        address = next((line.split()[1] for line in head.stdout if line.startswith("address ")), None)
        if address is None:
            raise RuntimeError(f"Ray did not start: code {head.wait()}")
        yield address
    finally:
        head.stdin.close()
        head.wait()
        head.stdout.close()


def main(num_cpus: int) -> None:
    from ray.cluster_utils import Cluster

    options = {"num_cpus": num_cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(int(sys.argv[1]))
