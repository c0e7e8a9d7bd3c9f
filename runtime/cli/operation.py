"""How a command shows an operation on the fleet: a bar for people, lines for a log, JSON for scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardray.runtime.client import Progress

_GOES_ON = "The server goes on with it; `shardray status --watch` shows how far it is."


def follow(steps: Iterator[Progress], as_json: bool) -> None:
    """Show an operation until it is done. Raises ServerError, and KeyboardInterrupt after saying what that means."""
    show = _print_json if as_json else _show_bar if sys.stderr.isatty() else _print_lines
    try:
        with contextlib.closing(steps):  # type: ignore[type-var]
            show(steps)
    except KeyboardInterrupt:
        print(_GOES_ON, file=sys.stderr)
        raise


def _print_json(steps: Iterator[Progress]) -> None:
    for step in steps:
        print(json.dumps(dataclasses.asdict(step)), flush=True)


def _print_lines(steps: Iterator[Progress]) -> None:
    for step in steps:
        print(f"{step.fraction:4.0%}  {step.doing}", flush=True)


def _show_bar(steps: Iterator[Progress]) -> None:
    """The bar goes away at the end; what was done last stays."""
    from shardray.runtime.cli.progress import operation_bar

    last = None
    with operation_bar() as report:
        for last in steps:
            report(last.doing, last.fraction)
    if last is not None:
        print(last.doing)
