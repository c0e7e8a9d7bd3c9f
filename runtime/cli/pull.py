"""``shardray pull``: weights into the local cache."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a hub id (org/name), a folder or a .gguf file.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch a model into the local cache and print its folder."""
    from shardray.runtime.cli.progress import fetch_bars
    from shardray.runtime.model.sources import resolve_model

    with fetch_bars() as progress:
        folder = resolve_model(model, revision=revision, progress=progress)
    typer.echo(json.dumps({"model": model, "folder": str(folder)}) if as_json else str(folder))
