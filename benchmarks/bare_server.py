"""A gRPC server that does nothing but write, the same bytes to every stream: what the front door is held against.

Prints its port, then runs until it is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import grpc
import grpc.aio

from shardray.runtime.server.loop import run
from shardray.v1 import inference_pb2

_SERVICE = "shardray.v1.InferenceService"
_MESSAGE = inference_pb2.GenerateResponse(request_id=f"req-{0:032x}", text=" the", token_ids=[500]).SerializeToString()


async def serve(rate: float) -> None:
    """Until cancelled; ``rate`` messages a second for each call of Generate, all at once."""
    waiting: set[asyncio.Event] = set()

    async def generate(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        turn = asyncio.Event()
        waiting.add(turn)
        try:
            while True:
                await turn.wait()
                turn.clear()
                await context.write(_MESSAGE)
        finally:
            waiting.discard(turn)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(generate)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    next_s = loop.time()
    while True:
        next_s += 1 / rate
        await asyncio.sleep(next_s - loop.time())
        for turn in waiting:
            turn.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})
    run(serve(options.rate))


if __name__ == "__main__":
    main()
