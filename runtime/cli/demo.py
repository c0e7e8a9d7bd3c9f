"""``shardray demo``: a small model served from two hosts on this machine, and one question to it over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from shardray.runtime.config import Config
    from shardray.runtime.driver.fleet import FleetStatus
    from shardray.v1 import inference_pb2

_QUESTION = "What is gravity? Answer in two sentences."


def command(
    question: Annotated[str, typer.Argument(help="What to ask.")] = _QUESTION,
    overrides: options.Overrides = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 96,
) -> None:
    """Serve a small model here and ask it something."""
    from shardray.runtime.cli.serve import fetch_model, import_all
    from shardray.runtime.config import load_config

    example = Path(str(resources.files("shardray").joinpath("deploy/examples/cpu-demo.yaml")))
    settings = load_config(example, ["grpc.listen=127.0.0.1:0", *(overrides or ())])
    import_all(settings.ray)
    from shardray.runtime.server.loop import run

    folder = fetch_model(settings)
    run(_demo(settings, folder, question, max_tokens))


async def _demo(settings: Config, folder: Path, question: str, max_tokens: int) -> None:
    """Ctrl-C cancels this, wherever it stands; ``serve`` gives everything back all the same."""
    from shardray.runtime.cli.watchers import text_watcher
    from shardray.runtime.serve import serve

    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    with text_watcher(settings) as shown:

        def on_ready(address: str, fleet: FleetStatus) -> None:
            shown.on_ready(address, fleet)
            ready.set_result(address)

        watcher = dataclasses.replace(shown, on_ready=on_ready)
        serving = asyncio.create_task(serve(settings, folder, watcher, stop))
        try:
            await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await _ask(ready.result(), question, max_tokens)
        finally:
            stop.set()
            await serving
    print("Stopped.")


async def _ask(address: str, question: str, max_tokens: int) -> None:
    from shardray.runtime.client import Access, AsyncClient

    print(f"> {question}")
    messages = [{"role": "user", "content": question}]
    async with AsyncClient(address, access=Access()) as client:
        async for delta in client.stream(messages, max_tokens=max_tokens, temperature=0.0):
            print(delta.text, end="", flush=True)
            if delta.usage is not None and delta.timing is not None:
                print(f"\n\n{_speed(delta.usage.num_output_tokens, delta.timing)}")


def _speed(num_tokens: int, timing: inference_pb2.Timing) -> str:
    first_s = timing.time_to_first_token_s
    rate = (num_tokens - 1) / (timing.total_s - first_s) if timing.total_s > first_s else 0.0
    return f"{num_tokens} tokens over gRPC: the first after {1000 * first_s:.0f} ms, then {rate:.0f} a second."
