"""A token for a Ray that shardray starts: without one, whoever reaches its ports runs code as the user that serves."""

from __future__ import annotations

import os
import secrets

from shardray.runtime.config import RaySettings


def choose_token(settings: RaySettings) -> None:
    """To be called before ray is imported, which is when it reads the variables.

    A new token each time, for this process and those that it starts. What the environment says of ``RAY_AUTH_MODE``
    counts more; a cluster that is joined has a token, or none, of its own.
    """
    if settings.address == "local" and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
