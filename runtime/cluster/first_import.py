"""The first import of the runtime in a new host: most of the time that replacing a lost one takes.

Two things cost time there beside the imports themselves. What they make is kept, so looking for garbage among it finds
none: a fifth of the time. And torch's libraries are mapped and relocated under the interpreter's lock, although the
loader does not need it: they are mapped in a thread, beside imports that are Python's own work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_RUNTIME = ("shardray.runtime.cluster.leader", "shardray.runtime.engine.shard")


def load_runtime(model_dir: str, dtype: str, device: str, num_threads: int) -> None:
    """Import all that a rank needs, and load the kernels for a model in ``model_dir``; quick the second time."""
    is_first = _RUNTIME[-1] not in sys.modules
    with _no_garbage() if is_first else contextlib.nullcontext():
        if is_first:
            _import_all()
        from shardray.runtime.engine.shard import warm_up

        warm_up(model_dir, dtype, device, num_threads)


def _import_all() -> None:
    mapping = threading.Thread(target=_map_torch)
    mapping.start()
    if importlib.util.find_spec("numba") is not None:
        importlib.import_module("numba")
    for name in _RUNTIME:
        importlib.import_module(name)
    mapping.join()


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """What is made meanwhile is never looked at again by the garbage collector."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def _map_torch() -> None:
    """If that fails, the import of torch is what says so."""
    torch = importlib.util.find_spec("torch")
    for folder in () if torch is None else torch.submodule_search_locations or ():
        library = Path(folder) / "lib" / "libtorch_python.so"
        dlopen = ctypes.CDLL(None).dlopen  # not ctypes.CDLL(library), which holds the lock meanwhile
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        dlopen(os.fsencode(library), os.RTLD_LAZY)
