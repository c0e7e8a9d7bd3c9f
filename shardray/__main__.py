"""``python -m shardray`` is the ``shardray`` command."""

from shardray.runtime.cli import main

main()
