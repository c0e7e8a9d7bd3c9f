"""A replica of one rank as a process of its own, without Ray. Prints its port, runs until killed."""

from __future__ import annotations

import sys
from pathlib import Path

from shardray.runtime.cluster.leader import LeaderServer
from shardray.runtime.engine.assignment import ShardAssignment
from shardray.runtime.engine.shard import form_shard
from tests.stub_replica import SECRET, ReplicaProcess


class RealReplica(ReplicaProcess):
    """Serves the model in ``folder`` in float32; ``max_model_len`` None takes the model's own."""

    def __init__(self, folder: Path, max_model_len: int | None = None) -> None:
        super().__init__("tests.real_replica", str(folder), *([] if max_model_len is None else [str(max_model_len)]))


def main() -> None:
    place = ShardAssignment(
        epoch="e",
        secret=SECRET.secret,
        rank=0,
        tp_size=1,
        pp_size=1,
        nodes=("here",),
        store_host="",
        store_port=0,
        bind_host="127.0.0.1",
        device="cpu",
        model_dir=sys.argv[1],
        dtype="float32",
        max_model_len=int(sys.argv[2]) if len(sys.argv) > 2 else None,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_memory_bytes=64 << 20,
    )
    engine = form_shard(place).engine
    server = LeaderServer()
    print(server.start("127.0.0.1", engine, SECRET), flush=True)
    engine.run(server.publish)


if __name__ == "__main__":
    main()
