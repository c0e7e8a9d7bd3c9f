"""The ``shardray`` command."""

from shardray.runtime.cli.app import main

__all__ = ["main"]
