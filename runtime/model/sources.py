"""From what a person writes as ``model.source`` to a folder that is ready to load.

A ready folder holds ``config.json`` and ``*.safetensors``, and usually a tokenizer and a chat template.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.runtime.model.bundled import BUNDLED_MODELS, BundledModel, fetch_bundled
from shardray.runtime.model.hub import fetch_from_hub, fetch_headers, find_in_hub_cache
from shardray.runtime.model.model_cache import (
    CONVERTER_VERSION,
    ModelSourceError,
    Progress,
    build_folder,
    default_cache_dir,
    silent,
)

__all__ = ["ModelSourceError", "Progress", "read_headers", "resolve_model"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve_model(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> Path:
    """Return the folder of ``source``, fetching or converting it first if need be.

    ``source`` is the name of a bundled model (``smollm2-135m``), a folder, a ``.gguf`` file or a hub id (``org/name``).
    What exists on disk wins over a hub id, and a bundled name over both (``./name`` is the folder). ``revision`` is a
    branch, tag or commit on the hub.
    Conversions are kept in ``cache_dir`` (default: ``$SHARDRAY_CACHE`` or ``~/.cache/shardray``); hub snapshots stay
    in the hub's own cache. Raises ModelSourceError, in one line that names the fix.
    """
    match _locate(source, revision, cache_dir):
        case _Converted(folder, convert):
            return build_folder(folder, lambda target: convert(target, progress), progress)
        case _HubId():
            return _check_folder(fetch_from_hub(source, revision, progress))
        case folder:
            return _check_folder(folder)


def read_headers(source: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """The headers of ``source`` in a folder with its ``config.json``; of a hub id that is not on this machine, only
    these are fetched. ``source`` is as for ``resolve_model``. Raises ModelSourceError, also for what has to be pulled
    before anything can be said of it.
    """
    match _locate(source, revision, cache_dir):
        case _Converted(folder) if not folder.is_dir():
            raise ModelSourceError(f"{source}: is not in the cache yet; fetch it first: shardray pull {source}")
        case _Converted(folder):
            return _open(folder)
        case _HubId():
            cached = find_in_hub_cache(source, revision)
            with suppress(ModelSourceError):  # a pull that was interrupted has not brought all files
                if cached is not None:
                    return _open(cached)
            return fetch_headers(source, revision)
        case folder:
            return _open(folder)


@dataclass(frozen=True)
class _Converted:
    """What becomes a folder of the cache by ``convert``, which gets the folder to fill."""

    folder: Path
    convert: Callable[[Path, Progress], None]


class _HubId:
    """The source is one."""


def _locate(source: str, revision: str | None, cache_dir: Path | None) -> Path | _Converted | _HubId:
    """Where ``source`` is or comes from; a Path is a folder of the user's own. Raises ModelSourceError."""
    path = Path(source).expanduser()
    models_dir = (cache_dir or default_cache_dir()) / "models"
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not path.exists() and path.suffix != ".gguf"
    if revision is not None and not is_hub_id:
        raise ModelSourceError(f"{source}: revision {revision!r} applies to hub ids only; leave it out")
    if source in BUNDLED_MODELS:
        model = BUNDLED_MODELS[source]
        return _Converted(_bundled_folder(model, models_dir), partial(fetch_bundled, model))
    if source and path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf":
        return _Converted(_gguf_folder(path, models_dir), partial(_convert_gguf, path.resolve()))
    if is_hub_id:
        return _HubId()
    raise _unknown_source(source)


def _bundled_folder(model: BundledModel, models_dir: Path) -> Path:
    return models_dir / f"{model.name}-{model.sha256[:12]}-v{CONVERTER_VERSION}"


def _gguf_folder(path: Path, models_dir: Path) -> Path:
    if not path.is_file():
        raise ModelSourceError(f"{path}: no such file")
    path = path.resolve()
    stat = path.stat()
    key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"  # another file under the same path is another model
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return models_dir / f"{path.stem}-{digest}-v{CONVERTER_VERSION}"


def _convert_gguf(path: Path, folder: Path, progress: Progress) -> None:
    from shardray.runtime.model.gguf_import import convert_gguf  # torch and gguf, for those who convert

    convert_gguf(path, folder, progress)


def _check_folder(folder: Path) -> Path:
    _open(folder)  # a missing or truncated shard shows here, not on a rank
    return folder


def _open(folder: Path) -> Checkpoint:
    """Reads the headers only."""
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{folder}: has no config.json; a model folder holds config.json and *.safetensors")
    try:
        return Checkpoint(folder)
    except CheckpointError as error:
        raise ModelSourceError(str(error)) from error


def _unknown_source(source: str) -> ModelSourceError:
    if "/" in source or source.startswith((".", "~")):
        return ModelSourceError(f"{source}: no such file or folder, and not a hub id (org/name)")
    known = ", ".join(sorted(BUNDLED_MODELS))
    nearest = difflib.get_close_matches(source.lower(), BUNDLED_MODELS, n=1, cutoff=0.4)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    return ModelSourceError(
        f"{source!r}: unknown model{hint} (give one of: {known}; a folder; a .gguf file; a hub id org/name)"
    )
