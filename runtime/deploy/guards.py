"""What keeps others from the fleet: who may connect to which pods, and how many pods may be taken away at once."""

from __future__ import annotations

from collections.abc import Sequence

from shardray.runtime.config import Config
from shardray.runtime.deploy.front import ports
from shardray.runtime.deploy.names import Manifest, RenderOptions
from shardray.runtime.deploy.sizes import PodSizes

_ANY_NAMESPACE: Manifest = {"namespaceSelector": {}}


def guards(config: Config, sizes: PodSizes, options: RenderOptions) -> list[Manifest]:
    return [
        _disruption_budget("head", 1, options),
        _disruption_budget("front", 1, options),
        _disruption_budget("worker", sizes.num_pods - 1, options),
        _inside(options),
        _front(config, options),
    ]


def _disruption_budget(component: str, min_available: int, options: RenderOptions) -> Manifest:
    """Workers go one by one, and are healed from; head and front are moved by the operator, when it suits.

    Always as a number that has to stay: for ``maxUnavailable`` and for shares Kubernetes asks the pods' owner how many
    there should be, and refuses every eviction if that has no scale subresource, as a RayCluster has none.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": options.metadata(f"-{component}"),
        "spec": {"minAvailable": min_available, "selector": {"matchLabels": options.labels(component)}},
    }


def _inside(options: RenderOptions) -> Manifest:
    """Ray, and the links between ranks: pods of the fleet alone. Whoever reached these ports could run code there."""
    fleet = {"podSelector": {"matchLabels": options.labels()}}
    return _policy("-inside", options.labels(), [{"from": [fleet]}], options)


def _front(config: Config, options: RenderOptions) -> Manifest:
    """Clients: from anywhere if they have to show who they are, else from the same namespace. Metrics: Prometheus."""
    found = ports(config)
    rules = [_clients(found["grpc"], config.grpc.asks_who_calls)]
    if "gateway" in found:
        rules.append(_clients(found["gateway"], not config.gateway.lets_everyone_in))
    if "metrics" in found:
        prometheus = {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
        rules.append({"from": [{**_ANY_NAMESPACE, "podSelector": prometheus}], "ports": [{"port": found["metrics"]}]})
    return _policy("-front", options.labels("front"), rules, options)


def _clients(port: int, asks_who_calls: bool) -> Manifest:
    ports: Manifest = {"ports": [{"port": port}]}
    return ports if asks_who_calls else {**ports, "from": [{"podSelector": {}}]}


def _policy(suffix: str, labels: dict[str, str], rules: Sequence[Manifest], options: RenderOptions) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": options.metadata(suffix),
        "spec": {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"], "ingress": list(rules)},
    }
