"""What settings share: how sections are checked; types of counts, durations, sizes in bytes, addresses."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

STRICT_KEYS = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # of a section
_BYTES_PER_UNIT = {
    "": 1,
    "b": 1,
    **{unit: 1000**power for power, unit in enumerate(("kb", "mb", "gb", "tb"), start=1)},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_FLOPS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGTP])FLOP/s\s*")
_SIZE_HINT = "a number of bytes or a size such as 512MiB or 2GiB"
_LISTEN = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(?P<port>\d{1,5})")
_RAY_ADDRESS = re.compile(r"local|auto|(ray://)?[^\s:/]+:\d{1,5}")


def parse_bytes(text: str | int) -> int:
    """``"2GiB"`` → 2147483648. Units: B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024).

    Raises ValueError that names what would be accepted.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    scale = _BYTES_PER_UNIT.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise ValueError(f"{text!r} is not {_SIZE_HINT}")
    return int(float(match[1]) * scale) if "." in match[1] else int(match[1]) * scale


def parse_bandwidth(text: str) -> float:
    """``"3.35TB/s"`` → bytes a second. Raises ValueError."""
    if not text.endswith("/s"):
        raise ValueError(f"{text!r} is no bandwidth such as 3.35TB/s or 900GB/s")
    return float(parse_bytes(text.removesuffix("/s")))


def parse_flops(text: str) -> float:
    """``"989TFLOP/s"`` → floating point operations a second. Raises ValueError."""
    match = _FLOPS.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no rate such as 989TFLOP/s or 300GFLOP/s")
    return float(match[1]) * 1000.0 ** (" kMGTP".index(match[2]))


def parse_listen(address: str) -> tuple[str, int]:
    """``"127.0.0.1:50051"`` or ``"[::1]:50051"`` → (host, port). Raises ValueError."""
    match = _LISTEN.fullmatch(address) if isinstance(address, str) else None
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{address!r} is not host:port with a port up to 65535")
    return match["host"].strip("[]"), int(match["port"])


def join_listen(host: str, port: int) -> str:
    """The reverse of ``parse_listen``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches ``host:port``."""
    return is_loopback_host(parse_listen(address)[0])


def is_loopback_host(host: str) -> bool:
    """Whether ``host`` is this machine for itself. A name other than localhost may be any address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_listen(address: str) -> str:
    parse_listen(address)
    return address


def _check_ray_address(address: str) -> str:
    if not isinstance(address, str) or _RAY_ADDRESS.fullmatch(address) is None:
        raise ValueError(f"{address!r} is not an address of a Ray cluster")
    return address


# Strict, because a YAML `yes` or `"64"` where a number is meant is a mistake worth hearing about.
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Bytes = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(parse_bytes),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}], "x-accepts": _SIZE_HINT}
    ),
]
Listen = Annotated[
    str,
    BeforeValidator(_check_listen),
    WithJsonSchema({"type": "string", "x-accepts": 'host:port such as "127.0.0.1:50051" (port 0 takes a free one)'}),
]
RayAddress = Annotated[
    str,
    BeforeValidator(_check_ray_address),
    WithJsonSchema({"type": "string", "x-accepts": "local, auto, host:port or ray://host:port"}),
]
