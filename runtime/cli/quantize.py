"""``shardray quantize``: a model with weights of 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a hub id (org/name), a folder or a .gguf file.")],
    folder: Annotated[Path, typer.Argument(help="Where the new model is written; there must be nothing yet.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model anew with weights of 8 bits: half the memory, and up to twice the tokens a second."""
    from shardray.runtime.cli.progress import fetch_bars
    from shardray.runtime.model.model_cache import ModelSourceError, build_folder
    from shardray.runtime.model.quantize import quantize_folder, stored_bytes
    from shardray.runtime.model.sources import resolve_model

    if folder.exists():
        raise ModelSourceError(f"{folder}: is there already; name a folder that is not")
    with fetch_bars() as progress:
        source = resolve_model(model, revision=revision, progress=progress)
        build_folder(folder, lambda target: quantize_folder(source, target, progress), progress)
    before, after = stored_bytes(source), stored_bytes(folder)
    if as_json:
        typer.echo(json.dumps({"model": model, "folder": str(folder), "num_bytes": after, "num_bytes_before": before}))
    else:
        typer.echo(f"{folder}: {after / 2**20:.0f} MiB of weights, where there were {before / 2**20:.0f}")
