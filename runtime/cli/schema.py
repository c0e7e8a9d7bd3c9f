"""``shardray schema``: the settings, for editors and validators."""

from __future__ import annotations

import json

import typer


def command() -> None:
    """Print the JSON Schema of serving files."""
    from shardray.runtime.config import config_schema

    typer.echo(json.dumps(config_schema(), indent=2))
