"""A driver, its server and a client on this machine, with stub replicas behind them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from shardray.runtime.client import Access, AsyncClient
from shardray.runtime.config import Config, GatewaySettings, GrpcSettings, LimitsSettings, ModelSettings
from shardray.runtime.driver.driver import Driver
from shardray.runtime.driver.operations import FleetOperator
from shardray.runtime.engine.assignment import ShardInfo
from shardray.runtime.model.tokenizer import Tokenizer
from shardray.runtime.observe.observation import Observation
from shardray.runtime.server.loop import run as run_loop
from shardray.runtime.server.server import Server
from tests.stub_replica import SECRET, StubReplica

T = TypeVar("T")

SHARD = ShardInfo(
    rank=0,
    stage=0,
    tp_rank=0,
    host="here",
    pid=1,
    device="cpu",
    first_layer=0,
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    vocab_size=300,
    weight_bytes=1000,
    kv_bytes=2000,
    num_kv_tokens=4096,
)


@dataclasses.dataclass
class Serving:
    driver: Driver
    server: Server
    client: AsyncClient
    address: str
    replicas: list[StubReplica]


@contextlib.asynccontextmanager
async def serving(
    tokenizer: Tokenizer | None,
    num_replicas: int = 1,
    limits: LimitsSettings | None = None,
    max_num_seqs: int = 8,
    grpc: GrpcSettings | None = None,
    operator: Callable[[Driver], FleetOperator] | None = None,
    access: Access | None = None,
    observation: Observation | None = None,
    gateway: GatewaySettings | None = None,
    **options: float,
) -> AsyncIterator[Serving]:
    """``options`` are those of the stub replicas."""
    observation = observation or Observation(Config(model=ModelSettings(source="stub")))
    driver = Driver("stub", tokenizer, limits or LimitsSettings(), max_num_seqs, observer=observation.requests)
    acts = operator(driver) if operator else None
    server = Server(grpc or GrpcSettings(listen="127.0.0.1:0"), driver, acts, observation.on_call, gateway)
    replicas = [StubReplica(max_num_seqs=max_num_seqs, **options) for _ in range(num_replicas)]
    try:
        address = f"127.0.0.1:{await server.start()}"
        for replica_id, replica in enumerate(replicas):
            await driver.attach(replica_id, replica.address, SECRET, [SHARD])
        async with AsyncClient(address, timeout_s=120, access=access) as client:
            yield Serving(driver, server, client, address, replicas)
    finally:
        await server.stop(0)
        for replica in replicas:
            replica.kill()


@contextlib.contextmanager
def in_thread(opened: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
    """What ``opened`` gives, open in the loop of another thread."""
    entered: concurrent.futures.Future[T] = concurrent.futures.Future()
    may_end = threading.Event()

    async def hold() -> None:
        async with opened as value:
            entered.set_result(value)
            await asyncio.to_thread(may_end.wait)

    def run() -> None:
        try:
            run_loop(hold())  # as the server runs
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield entered.result(30)
    finally:
        may_end.set()
        thread.join()


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until ``condition`` holds; fails the test if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        await asyncio.sleep(0.01)
