"""A typed client of a shardray server, for threads and for asyncio. Needs neither torch nor Ray."""

from shardray.runtime.client.aio import AsyncClient
from shardray.runtime.client.blocking import Client
from shardray.runtime.client.channel import Access, AccessError
from shardray.runtime.client.errors import ServerError
from shardray.runtime.client.operations import Progress, ShapeOptions
from shardray.runtime.client.requests import EmbedOptions, Prompt, SamplingOptions
from shardray.runtime.client.results import Completion, Delta

__all__ = [
    "Access",
    "AccessError",
    "AsyncClient",
    "Client",
    "Completion",
    "Delta",
    "EmbedOptions",
    "Progress",
    "Prompt",
    "SamplingOptions",
    "ServerError",
    "ShapeOptions",
]
