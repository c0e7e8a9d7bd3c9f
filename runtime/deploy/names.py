"""What is told on the command line besides the serving file, and where things lie inside every pod."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardray import __version__

Manifest = dict[str, Any]

USER_ID = 10001  # of deploy/Containerfile
CONFIG_DIR = "/etc/shardray-serving"
CONFIG_FILE = "serving.yaml"
HOME_DIR = "/home/shardray"
MODEL_DIR = "/models"
RAY_PORT = 6379
RAYLET_PORT = 8076  # fixed, so that a probe can ask for it
OBJECT_STORE_BYTES = 128 << 20  # no tensor goes through it; near Ray's minimum

# A label's form, short enough for what KubeRay and Kubernetes append.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


class RenderError(ValueError):
    """A serving file or an option that no manifests can be made of; one line with the key and the fix."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """``overrides`` are those of ``--set``: they become arguments of the driver."""

    name: str = "shardray"
    namespace: str | None = None
    image: str | None = None
    hosts_per_pod: int | None = None
    memory_bytes: int | None = None  # of a worker pod
    model_claim: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, value in (("--name", self.name), ("--namespace", self.namespace)):
            if value is not None and _NAME.fullmatch(value) is None:
                raise RenderError(
                    f"{option} {value}: is no name in Kubernetes; give up to 40 of a-z, 0-9 and -, a letter first"
                )

    def image_for(self, device: str) -> str:
        return self.image or f"shardray:{__version__}-{device}"

    def metadata(self, suffix: str = "") -> Manifest:
        """Of an object that belongs to the fleet."""
        found: Manifest = {"name": self.name + suffix, "labels": self.labels()}
        return found if self.namespace is None else {**found, "namespace": self.namespace}

    def labels(self, component: str | None = None) -> dict[str, str]:
        """Of all pods, or of one part: ``head``, ``worker``, ``front``. KubeRay has the usual labels for itself."""
        found = {"shardray/fleet": self.name}
        return found if component is None else {**found, "shardray/part": component}

    @property
    def head_address(self) -> str:
        """The service that KubeRay makes for the head of a cluster of this name."""
        return f"{self.name}-head-svc:{RAY_PORT}"

    @property
    def ray_secret(self) -> str:
        """Has Ray's token, under the key ``token``."""
        return f"{self.name}-ray"


def env(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]
