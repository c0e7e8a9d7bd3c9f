"""``shardray serve``: the fleet that a YAML file describes, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardray.runtime.cli import options

if TYPE_CHECKING:
    from shardray.runtime.config import Config, RaySettings


def command(
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each event.")] = False,
) -> None:
    """Serve the model of a YAML file.

    Ctrl-C or SIGTERM lets running requests end first; twice does not wait for them.
    """
    from shardray.runtime.config import load_config

    settings = load_config(config, overrides or ())
    import_all(settings.ray)
    from shardray.runtime.cli.watchers import json_watcher, text_watcher
    from shardray.runtime.observe.extras import check_extras
    from shardray.runtime.observe.logs import configure_logs
    from shardray.runtime.serve import serve
    from shardray.runtime.server.loop import run

    check_extras(settings)
    configure_logs(settings.logging)
    folder = fetch_model(settings)
    with (json_watcher if as_json else text_watcher)(settings) as watcher:
        try:
            run(_until_signal(lambda stop: serve(settings, folder, watcher, stop)))
        except asyncio.CancelledError:  # asked to stop twice
            raise typer.Exit(130) from None


def import_all(settings: RaySettings) -> None:
    """Import what a process that serves needs; until that is done, Ctrl-C ends it without more ado."""
    from shardray.runtime.cluster.ray_token import choose_token

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    # Ray starts its processes by fork and exec, which needs no handlers of gRPC; they would complain on stderr.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Else its core logs a line, with bytes of the stranger's choice, for every connection that speaks no HTTP/2.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Read when ray is imported, and not for the hosts to inherit: SIGTERM is how this process is stopped, not a crash.
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"
    choose_token(settings)
    # Some libraries swallow a KeyboardInterrupt while they are imported; there is nothing to clean up yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import shardray.runtime.cli.watchers
    import shardray.runtime.model.sources
    import shardray.runtime.server.loop  # noqa: F401 - with all that these three import

    signal.signal(signal.SIGINT, signal.default_int_handler)
    del os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"]


def fetch_model(settings: Config) -> Path:
    """The model's folder, fetched with progress bars if need be. Not within an event loop: Ctrl-C ends it at once."""
    from shardray.runtime.cli.progress import fetch_bars
    from shardray.runtime.model.sources import resolve_model

    with fetch_bars() as progress:
        return resolve_model(settings.model.source, revision=settings.model.revision, progress=progress)


async def _until_signal(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run ``serve(stop)``; the first SIGINT or SIGTERM sets ``stop``, the next one cancels."""
    stop = asyncio.Event()
    serving = asyncio.ensure_future(serve(stop))

    def on_signal() -> None:
        if stop.is_set():
            serving.cancel()
        elif sys.stderr.isatty():
            print("Stopping when what runs has ended; Ctrl-C again stops at once.", file=sys.stderr)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    await serving
