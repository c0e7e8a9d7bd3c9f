"""Settings of a serving fleet: YAML file and overrides in, one frozen and validated ``Config`` out."""

from shardray.runtime.config.errors import ConfigError
from shardray.runtime.config.gateway import GatewaySettings
from shardray.runtime.config.load import config_schema, load_config
from shardray.runtime.config.observed import LoggingSettings, MetricsSettings, TracingSettings
from shardray.runtime.config.settings import (
    AutoscalingSettings,
    ClusterSettings,
    Config,
    DriverSettings,
    EngineSettings,
    GrpcAuthSettings,
    GrpcSettings,
    GrpcTlsSettings,
    LimitsSettings,
    ModelSettings,
    ParallelSettings,
    RaySettings,
    TlsSettings,
)
from shardray.runtime.config.units import parse_bytes

__all__ = [
    "AutoscalingSettings",
    "ClusterSettings",
    "Config",
    "ConfigError",
    "DriverSettings",
    "EngineSettings",
    "GatewaySettings",
    "GrpcAuthSettings",
    "GrpcSettings",
    "GrpcTlsSettings",
    "LimitsSettings",
    "LoggingSettings",
    "MetricsSettings",
    "ModelSettings",
    "ParallelSettings",
    "RaySettings",
    "TlsSettings",
    "TracingSettings",
    "config_schema",
    "load_config",
    "parse_bytes",
]
