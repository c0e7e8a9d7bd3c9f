"""``shardray embed``: the embeddings of texts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from shardray.runtime.cli import options


def command(
    texts: Annotated[list[str], typer.Argument(help="The texts; a single - reads them from stdin, one a line.")],
    server: options.Server = options.DEFAULT_SERVER,
    pooling: Annotated[str | None, typer.Option(help="mean, cls or last; left out: the model's own way.")] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Of length 1; left out: the model's own way.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long for the model.")] = False,
    timeout_s: options.Timeout = None,
) -> None:
    """Print the embedding of each text, one JSON list a line."""
    from shardray.runtime.client import Client

    lines = options.text_or_stdin("-").splitlines() if texts == ["-"] else texts
    with Client(server) as client:
        embeddings = client.embed(
            lines,
            timeout_s=timeout_s,
            pooling=pooling,  # type: ignore[arg-type]  # another word is refused there
            normalize=normalize,
            truncate=truncate,
        )
        for embedding in embeddings:
            print(json.dumps(embedding))
