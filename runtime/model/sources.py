"""From what a person writes as ``model.source`` to a folder that is ready to load.

A ready folder holds ``config.json`` and ``*.safetensors``, and usually a tokenizer and a chat template.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path

from shardray.parallel.checkpoint import Checkpoint, CheckpointError
from shardray.runtime.model.bundled import BUNDLED_MODELS, BundledModel, fetch_bundled
from shardray.runtime.model.gguf_import import CONVERTER_VERSION, convert_gguf
from shardray.runtime.model.hub import fetch_from_hub
from shardray.runtime.model.model_cache import ModelSourceError, Progress, build_folder, default_cache_dir, silent

__all__ = ["ModelSourceError", "Progress", "resolve_model"]

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
    if not source:
        raise _unknown_source(source)
    path = Path(source).expanduser()
    models_dir = (cache_dir or default_cache_dir()) / "models"
    is_hub_id = _HUB_ID.fullmatch(source) is not None and not path.exists() and path.suffix != ".gguf"
    if revision is not None and not is_hub_id:
        raise ModelSourceError(f"{source}: revision {revision!r} applies to hub ids only; leave it out")
    if source in BUNDLED_MODELS:
        return _resolve_bundled(BUNDLED_MODELS[source], models_dir, progress)
    if path.is_dir():
        return _check_folder(path.resolve())
    if path.suffix == ".gguf":
        return _resolve_gguf(path, models_dir, progress)
    if is_hub_id:
        return _check_folder(fetch_from_hub(source, revision, progress))
    raise _unknown_source(source)


def _resolve_bundled(model: BundledModel, models_dir: Path, progress: Progress) -> Path:
    target = models_dir / f"{model.name}-{model.sha256[:12]}-v{CONVERTER_VERSION}"
    return build_folder(target, lambda folder: fetch_bundled(model, folder, progress), progress)


def _resolve_gguf(path: Path, models_dir: Path, progress: Progress) -> Path:
    if not path.is_file():
        raise ModelSourceError(f"{path}: no such file")
    path = path.resolve()
    stat = path.stat()
    key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"  # another file under the same path is another model
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    target = models_dir / f"{path.stem}-{digest}-v{CONVERTER_VERSION}"
    return build_folder(target, lambda folder: convert_gguf(path, folder, progress), progress)


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"{folder}: has no config.json; a model folder holds config.json and *.safetensors")
    try:
        Checkpoint(folder)  # reads the headers only: a missing or truncated shard shows here, not on a rank
    except CheckpointError as error:
        raise ModelSourceError(str(error)) from error
    return folder


def _unknown_source(source: str) -> ModelSourceError:
    if "/" in source or source.startswith((".", "~")):
        return ModelSourceError(f"{source}: no such file or folder, and not a hub id (org/name)")
    known = ", ".join(sorted(BUNDLED_MODELS))
    nearest = difflib.get_close_matches(source.lower(), BUNDLED_MODELS, n=1, cutoff=0.4)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    return ModelSourceError(
        f"{source!r}: unknown model{hint} (give one of: {known}; a folder; a .gguf file; a hub id org/name)"
    )
