"""Files that pods find in place: the serving file, secrets, the journal, weights, and what Ray wants to be writable.

Secrets are named and not made: their contents never pass through here.
"""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from shardray.runtime.config import Config
from shardray.runtime.deploy.names import CONFIG_DIR, HOME_DIR, MODEL_DIR, Manifest, RenderError, RenderOptions
from shardray.runtime.deploy.sizes import mebibytes

_READABLE_BY_GROUP = 0o440  # what the server accepts for keys and tokens


@dataclass(frozen=True)
class Mount:
    """One volume and where a container sees it."""

    name: str
    path: str
    volume: Manifest
    read_only: bool = False

    def as_volume(self) -> Manifest:
        return {"name": self.name, **self.volume}

    def as_mount(self) -> Manifest:
        return {"name": self.name, "mountPath": self.path, **({"readOnly": True} if self.read_only else {})}


def scratch_mounts(shm_bytes: int) -> list[Mount]:
    """What every pod writes to: the root of its containers is read-only."""
    shm = {"medium": "Memory", "sizeLimit": mebibytes(shm_bytes)}
    return [
        Mount("tmp", "/tmp", {"emptyDir": {}}),
        Mount("shared-mem", "/dev/shm", {"emptyDir": shm}),
        Mount("home", HOME_DIR, {"emptyDir": {}}),
    ]


def model_mounts(config: Config, options: RenderOptions) -> list[Mount]:
    """Weights that all pods share, if a claim is given. Raises RenderError for a folder that no pod would have."""
    source = config.model.source
    if options.model_claim is not None:
        claim = {"persistentVolumeClaim": {"claimName": options.model_claim}}
        mounts = [Mount("models", MODEL_DIR, claim)]
    else:
        mounts = []
    is_path = source.startswith(("/", ".", "~")) or source.endswith(".gguf")
    if is_path and not (mounts and source.startswith(MODEL_DIR + "/")):
        raise RenderError(
            f"model.source: {source} is on this machine; copy it to a volume, give that with --model-claim, and name "
            f"the path below {MODEL_DIR}, where pods see it"
        )
    return mounts


def cluster_mounts(config: Config, options: RenderOptions) -> list[Mount]:
    """The certificates of ``cluster.tls``: on every pod, workers too."""
    files = config.cluster.tls
    if files is None:
        return []
    named = {"cluster.tls.ca": files.ca, "cluster.tls.cert": files.cert, "cluster.tls.key": files.key}
    return _secret_mounts([(f"{options.name}-cluster-tls", named)])


def front_mounts(config: Config, options: RenderOptions) -> list[Mount]:
    """The serving file, every secret, and the journal's volume."""
    mounts = [Mount("serving", CONFIG_DIR, {"configMap": {"name": f"{options.name}-serving"}}, read_only=True)]
    mounts += _secret_mounts(_secrets(config, options))
    if config.driver.journal is not None:
        folder = _folder_of("driver.journal", config.driver.journal)
        claim = {"persistentVolumeClaim": {"claimName": f"{options.name}-journal"}}
        mounts.append(Mount("journal", folder, claim))
    paths = [mount.path for mount in mounts]
    if len(set(paths)) < len(paths):
        raise RenderError(f"driver.journal: {config.driver.journal} lies beside secrets; give it a folder of its own")
    return mounts


def secret_names(config: Config, options: RenderOptions) -> dict[str, list[str]]:
    """The keys that each secret has to hold, by its name; of those that are mounted they are names of files."""
    mounted = {name: sorted(map(posixpath.basename, files.values())) for name, files in _secrets(config, options)}
    return {options.ray_secret: ["token"], **mounted}


def _secrets(config: Config, options: RenderOptions) -> list[tuple[str, dict[str, str]]]:
    """(name of the secret, its files by the key of the setting)"""
    found: list[tuple[str, dict[str, str]]] = []
    if (tls := config.grpc.tls) is not None:
        files = {"grpc.tls.cert": tls.cert, "grpc.tls.key": tls.key}
        if tls.client_ca is not None:
            files["grpc.tls.client_ca"] = tls.client_ca
        found.append((f"{options.name}-grpc-tls", files))
    if config.grpc.auth is not None:
        found.append((f"{options.name}-grpc-tokens", {"grpc.auth.tokens": config.grpc.auth.tokens}))
    if (inside := config.cluster.tls) is not None:
        files = {"cluster.tls.ca": inside.ca, "cluster.tls.cert": inside.cert, "cluster.tls.key": inside.key}
        found.append((f"{options.name}-cluster-tls", files))
    return found


def _secret_mounts(secrets: Iterable[tuple[str, dict[str, str]]]) -> list[Mount]:
    """One volume for each folder: whole folders are exchanged when a secret changes, single files would not be."""
    folders: dict[str, list[Manifest]] = defaultdict(list)
    for secret, files in secrets:
        in_folder: dict[str, list[Manifest]] = defaultdict(list)
        for key, path in files.items():
            name = posixpath.basename(path)
            in_folder[_folder_of(key, path)].append({"key": name, "path": name})
        for folder, items in in_folder.items():
            folders[folder].append({"secret": {"name": secret, "items": items}})
    return [
        Mount(
            f"secrets-{index}",
            folder,
            {"projected": {"defaultMode": _READABLE_BY_GROUP, "sources": sources}},
            read_only=True,
        )
        for index, (folder, sources) in enumerate(sorted(folders.items()))
    ]


def _folder_of(key: str, path: str) -> str:
    folder = posixpath.dirname(path)
    if not path.startswith("/") or folder in ("/", "/tmp", CONFIG_DIR, HOME_DIR):
        raise RenderError(f"{key}: {path} has to be in a folder of its own, by its whole path; /etc/shardray/... say")
    return folder
