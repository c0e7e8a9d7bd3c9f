"""Packages that only some settings need, and that the core is installed without."""

from __future__ import annotations

from importlib.util import find_spec

from shardray.runtime.config import Config


class MissingExtraError(ValueError):
    """A setting needs a package that is not installed; one line with the extra that has it."""


def check_extras(config: Config) -> None:
    """Raises MissingExtraError, before anything is started."""
    if config.metrics.listen is not None:
        _require("metrics.listen", config.metrics.listen, "prometheus_client", "metrics")
    if config.tracing.endpoint is not None:
        _require("tracing.endpoint", config.tracing.endpoint, "opentelemetry", "tracing", "opentelemetry-sdk")
    if config.gateway.listen is not None:
        _require("gateway.listen", config.gateway.listen, "smg_grpc_proto", "gateway")
    if config.grpc.kserve:
        _require("grpc.kserve", "true", "tritonclient", "kserve", off="false")


def _require(key: str, value: object, module: str, extra: str, package: str = "", off: str = "null") -> None:
    if find_spec(module) is None:
        package = package or module.replace("_", "-")
        fix = f"pip install 'shardray[{extra}]', or set it to {off}"
        raise MissingExtraError(f"{key}: {value} needs the package {package}, which is not installed; {fix}")
