"""Folders that appear whole or not at all: where converted models are kept on this machine.

Knows nothing of formats. A folder is built under a temporary name beside its target and renamed when complete, so an
interrupted build is never mistaken for a model, and a file lock lets concurrent builders of one target share the work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

CONVERTER_VERSION = 1  # raised when the result of a conversion changes, so that old results are not reused

Progress = Callable[[str, int, int | None], None]
"""``progress(description, done, total)``: bytes or items done; total is None while it is unknown."""


class ModelSourceError(ValueError):
    """A model that cannot be fetched, read or converted. One line that names the source and the fix."""


def silent(description: str, done: int, total: int | None) -> None:
    """The progress callback of a caller who does not ask for one."""


def default_cache_dir() -> Path:
    """``$SHARDRAY_CACHE``, or ``~/.cache/shardray``."""
    configured = os.environ.get("SHARDRAY_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "shardray"


def build_folder(target: Path, build: Callable[[Path], None], progress: Progress = silent) -> Path:
    """Return ``target``, calling ``build(empty_folder)`` first if it does not exist yet.

    Whatever ends ``build`` early (an exception, Ctrl-C, SIGKILL) leaves no ``target``; the next call starts over.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with _locked(target, progress):
        if target.is_dir():  # another process finished it while this one waited
            return target
        shutil.rmtree(partial, ignore_errors=True)  # only a killed builder leaves one: the lock is ours
        partial.mkdir()
        try:
            build(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(target: Path, progress: Progress) -> Iterator[None]:
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"Waiting for another process that is preparing {target.name}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
