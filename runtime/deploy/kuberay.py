"""``shardray render kuberay``: one serving file in, every manifest of its fleet out."""

from __future__ import annotations

from pathlib import Path

import yaml

from shardray.runtime.config import load_config
from shardray.runtime.deploy.front import front
from shardray.runtime.deploy.guards import guards
from shardray.runtime.deploy.mounts import secret_names
from shardray.runtime.deploy.names import Manifest, RenderOptions
from shardray.runtime.deploy.ray_cluster import ray_cluster
from shardray.runtime.deploy.sizes import size_pods


def render(path: Path, options: RenderOptions) -> str:
    """The manifests as one YAML stream, to be piped into ``kubectl apply -f -``.

    Raises ConfigError, RenderError, or what is wrong with the model where its size is asked for.
    """
    found = manifests(path, options)
    return _heading(path, options) + "".join(f"---\n{_dump(manifest)}" for manifest in found)


def manifests(path: Path, options: RenderOptions) -> list[Manifest]:
    config = load_config(path, options.overrides)
    sizes = size_pods(config, options)
    text = path.read_text(encoding="utf-8")
    return [ray_cluster(config, sizes, options), *front(config, text, sizes, options), *guards(config, sizes, options)]


def _heading(path: Path, options: RenderOptions) -> str:
    config = load_config(path, options.overrides)
    lines = [f"{path.name} for KubeRay; written by `shardray render kuberay`, to be written again when it changes."]
    for secret, files in secret_names(config, options).items():
        lines.append(f"Needs the secret {secret} with {', '.join(files)}.")
    if options.model_claim is not None:
        lines.append(f"Needs the claim {options.model_claim}, which all pods may write to (ReadWriteMany).")
    return "".join(f"# {line}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are, and no references between manifests."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _dump(manifest: Manifest) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
