"""Progress bars on stderr, if that is a terminal; stdout stays for what a script reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

FetchProgress = Callable[[str, int, int | None], None]  # (description, bytes or items done, total)
LoadProgress = Callable[[str, str, float], None]  # (host, what it does, share done in [0, 1])
StepProgress = Callable[[str, float], None]  # (what is done, share done in [0, 1])


@contextlib.contextmanager
def fetch_bars() -> Iterator[FetchProgress]:
    """One bar for each description that is reported."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with _bars(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def report(description: str, done: int, total: int | None) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield report


@contextlib.contextmanager
def load_bars() -> Iterator[LoadProgress]:
    """One bar for each host."""
    columns = (
        TextColumn("{task.fields[host]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.description}"),
    )
    with _bars(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def report(host: str, doing: str, fraction: float) -> None:
            if host not in tasks:
                tasks[host] = bars.add_task(doing, total=1.0, host=host)
            bars.update(tasks[host], description=doing, completed=fraction)

        yield report


@contextlib.contextmanager
def operation_bar() -> Iterator[StepProgress]:
    """One bar, with what is being done beside it."""
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %  {task.description}"), TimeElapsedColumn())
    with _bars(*columns) as bars:
        task = bars.add_task("", total=1.0)

        def report(doing: str, fraction: float) -> None:
            bars.update(task, description=doing, completed=fraction)

        yield report


def _bars(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
