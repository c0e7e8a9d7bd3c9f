"""shardray as users run it: ``shardray serve`` with its Ray hosts, asked over gRPC by the asyncio client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

from benchmarks.contestants.base import main, now_s
from benchmarks.contestants.engine_figures import KV_MEMORY_BYTES, figures
from benchmarks.protocol import Request, Setup, Trace
from shardray.runtime.client import AsyncClient, Client
from shardray.runtime.engine.request import EngineStats

_STOP_TIMEOUT_S = 60.0


class Served:
    """Options of the label: ``tp`` and ``pp``, the shard counts; each host has the contestant's number of threads.

    ``prefix=1`` keeps prefixes; otherwise the same prompt is computed in every pass.
    """

    def __init__(self, setup: Setup) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "shardray", "serve", "--json", *_settings(setup)], stdout=subprocess.PIPE, text=True
        )
        try:
            serving = self._until_serving()
        except BaseException:
            self._stop_server()
            raise
        self.details: dict[str, Any] = {
            "versions": {name: version(name) for name in ("shardray", "torch", "ray", "grpcio")},
            "num_shards": len(serving["shards"]),
        }
        self._address = str(serving["address"])
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_connect(self._address))
        self._watcher = Client(self._address)

    def prepare(self, requests: list[Request]) -> None:
        """Nothing: batches form as requests come."""

    def serve(self, requests: list[Request]) -> list[Trace]:
        return self._runner.run(self._serve(requests))

    def sample(self) -> dict[str, float]:
        """Of the first replica; at most half a second old."""
        stats = self._watcher.fleet().replicas[0].stats
        known = {field.name: getattr(stats, field.name) for field in stats.DESCRIPTOR.fields}
        return figures(EngineStats(**{name: known[name] for name in EngineStats.__struct_fields__ if name in known}))

    def close(self) -> None:
        self._watcher.close()
        self._runner.run(self._client.close())
        self._runner.close()
        self._stop_server()

    async def _serve(self, requests: list[Request]) -> list[Trace]:
        began_s = now_s()
        return await asyncio.gather(*(self._stream(request, began_s) for request in requests))

    async def _stream(self, request: Request, began_s: float) -> Trace:
        trace = Trace(began_s + request.arrival_s)
        if request.arrival_s:
            await asyncio.sleep(trace.submitted_s - now_s())
        deltas = self._client.stream(
            request.prompt_ids, max_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p,
            ignore_eos=True,
        )  # fmt: skip
        async for delta in deltas:
            trace.add(delta.token_ids, now_s())
        return trace

    def _until_serving(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "serving":
                return event
        raise RuntimeError(f"shardray serve ended with code {self._server.wait()} before it served")

    def _stop_server(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()


async def _connect(address: str) -> AsyncClient:
    client = AsyncClient(address)
    await client.wait_ready()
    return client


def _settings(setup: Setup) -> list[str]:
    settings = {
        "model.source": setup.options.get("quantized", setup.model_dir),
        "model.dtype": setup.activations_dtype,
        "parallel.tensor_parallel_size": setup.options.get("tp", "1"),
        "parallel.pipeline_parallel_size": setup.options.get("pp", "1"),
        "engine.device": "cpu",
        "engine.threads_per_host": setup.num_threads,
        "engine.max_num_seqs": setup.max_num_seqs,
        "engine.kv_memory_bytes": KV_MEMORY_BYTES,
        "engine.prefix_caching": str(setup.options.get("prefix") == "1").lower(),
        "grpc.listen": "127.0.0.1:0",
    }
    return [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]


if __name__ == "__main__":
    main(Served)
