"""Settings of the port for gateways."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from shardray.runtime.config.units import STRICT_KEYS, Flag, Listen, Text, is_loopback


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class GatewaySettings:
    """A port that speaks vllm.grpc.engine.VllmEngine, for gateways such as smg that serve the OpenAI API."""

    listen: Listen | None = None
    """Address of the port, e.g. 127.0.0.1:50061; null: there is none. Needs shardray[gateway]."""
    model_name: Text | None = None
    """Name that clients of the gateway ask for; null takes model.source."""
    discovery_file: Text | None = None
    """JSON file that the gateway watches for its workers, with this port while it serves; null: none is written."""
    advertise_host: Text | None = None
    """Host in the discovery file, as the gateway reaches it; null takes that of listen."""
    allow_unauthenticated: Flag = False
    """Whether an address that other machines reach is in plain text and lets everyone in, whatever grpc says."""

    @property
    def lets_everyone_in(self) -> bool:
        """Whether the tokens and certificates of ``grpc`` do not count here: gateways have none to show."""
        return self.allow_unauthenticated or self.listen is None or is_loopback(self.listen)
