"""A driver and its server over replicas without a model, for what the driver itself costs. Prints its address.

python -m benchmarks.stub_fleet NUM_REPLICAS MAX_NUM_SEQS STEP_TIME_S
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from shardray.runtime.config import LimitsSettings
from shardray.runtime.model.tokenizer import Tokenizer
from tests.serving import serving
from tests.stub_tokenizer import write_tokenizer

_TOKENS_A_SEQUENCE = 512


async def main(num_replicas: int, max_num_seqs: int, step_time_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(write_tokenizer(Path(folder)))
    limits = LimitsSettings(max_queued_requests=4096)
    kv_tokens = max_num_seqs * _TOKENS_A_SEQUENCE
    async with serving(
        tokenizer, num_replicas, limits, max_num_seqs, step_time_s=step_time_s, num_kv_tokens=kv_tokens
    ) as up:
        print(f"address {up.address}", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
