"""What all pods of a fleet have in common: who they run as, and how a container is put together."""

from __future__ import annotations

from collections.abc import Sequence

from shardray.runtime.deploy.mounts import Mount
from shardray.runtime.deploy.names import HOME_DIR, MODEL_DIR, RAYLET_PORT, USER_ID, Manifest, RenderOptions, env
from shardray.runtime.deploy.sizes import PodSizes


def container(name: str, sizes: PodSizes, options: RenderOptions, mounts: Sequence[Mount], **more: object) -> Manifest:
    """Nobody's root, on a root that is read-only, with no right beyond those of any process."""
    return {
        "name": name,
        "image": options.image_for(sizes.device),
        "env": _environment(mounts, options),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [mount.as_mount() for mount in mounts],
        **more,
    }


def pod_spec(containers: Sequence[Manifest], mounts: Sequence[Mount], **more: object) -> Manifest:
    """fsGroup lets the user read secrets and write volumes; one that is right is not walked through at each start."""
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **more,
        "containers": list(containers),
        "volumes": [mount.as_volume() for mount in mounts],
    }


def raylet_probes() -> Manifest:
    """Whether the raylet's port answers. KubeRay's own probes ask a dashboard, which the image goes without."""
    answers = {"tcpSocket": {"port": RAYLET_PORT}}
    return {
        "startupProbe": {**answers, "periodSeconds": 2, "failureThreshold": 60},
        "readinessProbe": {**answers, "periodSeconds": 5},
        "livenessProbe": {**answers, "periodSeconds": 10, "failureThreshold": 6},
    }


def _environment(mounts: Sequence[Mount], options: RenderOptions) -> list[Manifest]:
    """With Ray's token on every node, the driver's too: without one whoever reaches Ray's ports runs code there."""
    values = {"HOME": HOME_DIR, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    if any(mount.path == MODEL_DIR for mount in mounts):  # what one pod fetches, the others find
        values |= {"HF_HOME": f"{MODEL_DIR}/huggingface", "SHARDRAY_CACHE": f"{MODEL_DIR}/shardray"}
    ray_token = {"secretKeyRef": {"name": options.ray_secret, "key": "token"}}
    hub_token = {"secretKeyRef": {"name": f"{options.name}-hub", "key": "token", "optional": True}}
    return [
        *env(values),
        {"name": "RAY_AUTH_TOKEN", "valueFrom": ray_token},
        {"name": "HF_TOKEN", "valueFrom": hub_token},
    ]
