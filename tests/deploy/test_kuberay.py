"""``shardray render kuberay``: manifests that Kubernetes and KubeRay accept, that say what the serving file says.

``python -m tests.deploy.test_kuberay`` writes deploy/kuberay/ again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shardray.runtime.cli.app import run
from shardray.runtime.config import load_config
from shardray.runtime.deploy.kuberay import manifests, render
from shardray.runtime.deploy.names import RenderError, RenderOptions
from shardray.runtime.model.sources import resolve_model

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
EXAMPLES = DEPLOY / "examples"
RENDERED = {
    "shardray-cpu": ("kubernetes.yaml", RenderOptions(name="shardray-cpu")),
    "shardray-405b": ("two-nodes-pipeline.yaml", RenderOptions(name="shardray-405b", model_claim="llama-405b")),
}
# Native sidecars are on by default from 1.29 on; the newest that the validator knows.
VERSIONS = ("1.29", kubernetes_validate.latest_version())

# The fields of ray.io/v1 RayCluster that are used here, with their types. Its schema is not in any package; the pods
# within, its greatest part by far, are held against that of Kubernetes. An unknown field is an error.
SPEC = {"headGroupSpec": dict, "workerGroupSpecs": list}
HEAD = {"rayStartParams": dict, "template": dict}
WORKERS = {**HEAD, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
RAY_START = {"node-manager-port", "object-store-memory", "num-cpus", "num-gpus", "include-dashboard"}

Manifest = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def _model() -> None:
    """The memory of pods on CPUs is reckoned from its headers."""
    resolve_model("smollm2-135m")


def rendered(name: str) -> str:
    file, options = RENDERED[name]
    return render(EXAMPLES / file, options)


def made(config: str = "kubernetes.yaml", **options: Any) -> dict[tuple[str, str], Manifest]:
    """By kind and name."""
    found = manifests(EXAMPLES / config, RenderOptions(**options))
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in found}


def front_of(found: dict[tuple[str, str], Manifest]) -> Manifest:
    """The pod of the front."""
    spec: Manifest = found["Deployment", "shardray-front"]["spec"]["template"]["spec"]
    return spec


def pods(found: list[Manifest]) -> list[Manifest]:
    """Every pod that follows from the manifests."""
    templates = []
    for manifest in found:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "RayCluster":
            templates += [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
        elif manifest["kind"] == "Deployment":
            templates.append(spec["template"])
    return templates


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_checked_in_is_fresh(name: str) -> None:
    assert (DEPLOY / "kuberay" / f"{name}.yaml").read_text(encoding="utf-8") == rendered(name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RENDERED)
def test_kubernetes_accepts_every_object_and_every_pod(name: str, version: str) -> None:
    found = list(yaml.safe_load_all(rendered(name)))
    for manifest in found:
        if manifest["kind"] != "RayCluster":
            kubernetes_validate.validate(manifest, version, strict=True)
    for template in pods(found):
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "pod"}}
        kubernetes_validate.validate(pod, version, strict=True)
    assert len(pods(found)) == 3


def test_a_field_that_kubernetes_does_not_know_would_be_found() -> None:
    service = made()["Service", "shardray"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**service, "spec": {**service["spec"], "port": 1}}, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", RENDERED)
def test_the_ray_cluster_has_the_fields_that_kuberay_knows(name: str) -> None:
    [cluster] = [one for one in yaml.safe_load_all(rendered(name)) if one["kind"] == "RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    [workers] = spec["workerGroupSpecs"]
    for part, fields in ((spec, SPEC), (spec["headGroupSpec"], HEAD), (workers, WORKERS)):
        assert {key: type(value) for key, value in part.items()} == fields
    for part in (spec["headGroupSpec"], workers):
        assert set(part["rayStartParams"]) <= RAY_START
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]


@pytest.mark.parametrize("name", RENDERED)
def test_nobody_is_root_and_every_mount_has_its_volume(name: str) -> None:
    for template in pods(list(yaml.safe_load_all(rendered(name)))):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        # Else kubelet changes the owner of every file of a volume, hundreds of gigabytes of weights, at each start.
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_pods_are_as_many_and_as_large_as_the_plan_says() -> None:
    cluster = made("two-nodes-pipeline.yaml", model_claim="weights")["RayCluster", "shardray"]
    [workers] = cluster["spec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == 2  # a stage each
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert workers["rayStartParams"]["num-gpus"] == "8"
    cpu = made()["RayCluster", "shardray"]["spec"]["workerGroupSpecs"][0]
    assert cpu["replicas"] == 3  # 2 replicas of 2 hosts, and a spare
    memory_mib = int(cpu["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi"))
    assert 2 * (256 + 150 + 400) < memory_mib < 4096


@pytest.mark.parametrize(
    ("cpus_per_host", "cpus", "num_cpus"), [("1.5", "4500m", "5"), ("0.25", "750m", "1"), ("2", "6", "6")]
)
def test_ray_counts_enough_processors_for_every_host_of_a_pod(cpus_per_host: str, cpus: str, num_cpus: str) -> None:
    found = made(hosts_per_pod=3, overrides=(f"ray.cpus_per_host={cpus_per_host}",))
    workers = found["RayCluster", "shardray"]["spec"]["workerGroupSpecs"][0]
    [container] = workers["template"]["spec"]["containers"]
    assert (container["resources"]["requests"]["cpu"], workers["rayStartParams"]["num-cpus"]) == (cpus, num_cpus)


def test_the_driver_serves_the_file_as_it_is_and_joins_by_its_own_raylet() -> None:
    found = made(overrides=("parallel.replicas=1",))
    text = (EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")
    assert found["ConfigMap", "shardray-serving"]["data"] == {"serving.yaml": text}
    spec = front_of(found)
    [driver], [_, raylet] = spec["containers"], spec["initContainers"]
    assert driver["command"] == ["shardray", "serve", "/etc/shardray-serving/serving.yaml"]
    assert driver["args"][:2] == ["--set", "ray.address=shardray-head-svc:6379"]
    assert driver["args"][-2:] == ["--set", "parallel.replicas=1"]
    assert raylet["restartPolicy"] == "Always"
    assert "--address=shardray-head-svc:6379" in raylet["args"]
    assert spec["shareProcessNamespace"] is True


@pytest.mark.parametrize("claim", [None, "weights"])
def test_weights_are_fetched_before_the_driver_has_a_deadline(claim: str | None) -> None:
    """Into the same caches, on the same volumes."""
    model = ("model.source=org/large", "model.revision=v1", "engine.device=cuda")  # whose pods are sized without it
    spec = front_of(made(model_claim=claim, overrides=model))
    [driver], [fetching, raylet] = spec["containers"], spec["initContainers"]
    assert [*fetching["command"], *fetching["args"]] == ["shardray", "pull", "org/large", "--revision", "v1"]
    assert "startupProbe" not in fetching
    assert "restartPolicy" not in fetching  # it ends, and only then the raylet starts, and the driver
    assert raylet["restartPolicy"] == "Always"
    assert fetching["env"] == driver["env"]
    volumes = {mount["name"] for mount in fetching["volumeMounts"]}
    assert volumes == {"tmp", "home"} | ({"models"} if claim else set())
    assert all(mount in driver["volumeMounts"] for mount in fetching["volumeMounts"])


def test_nothing_is_guessed_from_the_node_that_a_pod_happens_to_be_on() -> None:
    def changes(*overrides: str) -> list[str]:
        [driver] = front_of(made(overrides=overrides))["containers"]
        return [word for word in driver["args"] if word != "--set"][1 : len(driver["args"]) // 2 - len(overrides)]

    assert changes() == ["engine.threads_per_host=2"]
    assert changes("engine.threads_per_host=4") == []
    assert changes("engine.device=auto") == ["engine.device=cuda"]
    assert changes("engine.device=cuda") == []


def test_the_driver_has_time_to_drain_and_is_asked_in_plain_text() -> None:
    spec = front_of(made())
    [driver] = spec["containers"]
    grace_s = load_config(EXAMPLES / "kubernetes.yaml").limits.shutdown_grace_s
    assert spec["terminationGracePeriodSeconds"] > grace_s + int(driver["lifecycle"]["preStop"]["exec"]["command"][1])
    assert driver["readinessProbe"]["grpc"] == {"port": 50052}
    assert "grpc" not in driver["livenessProbe"]  # loading is no reason to be killed


def test_secrets_are_named_with_their_files_and_never_made() -> None:
    found = made()
    assert not any(kind == "Secret" for kind, _ in found)
    sources = [
        source["secret"]
        for volume in front_of(found)["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
    ]
    assert {secret["name"]: {item["key"] for item in secret["items"]} for secret in sources} == {
        "shardray-grpc-tls": {"server.pem", "server-key.pem"},
        "shardray-grpc-tokens": {"tokens"},
    }
    assert "# Needs the secret shardray-grpc-tokens with tokens.\n" in render(
        EXAMPLES / "kubernetes.yaml", RenderOptions()
    )


def test_ray_lets_nobody_in_without_the_token_of_the_fleet() -> None:
    """On every node of Ray's and beside the driver; KubeRay copies it to what waits for the head."""
    secret = {"valueFrom": {"secretKeyRef": {"name": "shardray-ray", "key": "token"}}}
    specs = [template["spec"] for template in pods(list(made().values()))]
    containers = [one for spec in specs for one in [*spec["containers"], *spec.get("initContainers", [])]]
    assert {"ray-head", "ray-worker", "raylet", "driver"} <= {container["name"] for container in containers}
    for container in containers:
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert {"name": "RAY_AUTH_TOKEN", **secret} in container["env"]
    assert "# Needs the secret shardray-ray with token.\n" in render(EXAMPLES / "kubernetes.yaml", RenderOptions())


def test_certificates_of_the_cluster_are_on_workers_too() -> None:
    files = "{ca: /etc/shardray/inner/ca.pem, cert: /etc/shardray/inner/cert.pem, key: /etc/shardray/inner/key.pem}"
    found = made(overrides=(f"cluster.tls={files}",))
    worker = found["RayCluster", "shardray"]["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    for spec in (worker, front_of(found)):
        [container] = spec["containers"]
        assert "/etc/shardray/inner" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_strangers_reach_the_port_alone_and_only_where_they_are_asked_who_they_are() -> None:
    asked = made()["NetworkPolicy", "shardray-front"]["spec"]["ingress"]
    assert asked[0] == {"ports": [{"port": 50051}]}
    assert asked[1]["ports"] == [{"port": 9464}]
    open_to_all = made("two-nodes-pipeline.yaml", model_claim="x")["NetworkPolicy", "shardray-front"]["spec"]["ingress"]
    assert open_to_all == [{"ports": [{"port": 50051}], "from": [{"podSelector": {}}]}]
    inside = made()["NetworkPolicy", "shardray-inside"]["spec"]
    assert inside["ingress"] == [{"from": [{"podSelector": inside["podSelector"]}]}]
    labels = [template["metadata"]["labels"] for template in pods(list(made().values()))]
    assert all(label.items() >= inside["podSelector"]["matchLabels"].items() for label in labels)


def test_the_guide_moves_by_its_labels_what_no_eviction_moves() -> None:
    guide = (DEPLOY.parent / "docs" / "operators-guide.md").read_text(encoding="utf-8")
    [selector] = re.findall(r"kubectl delete pod -l (\S+)", guide)
    labels = dict(label.split("=") for label in selector.split(","))
    found = made(name=labels["shardray/fleet"])
    budget = found["PodDisruptionBudget", "shardray-cpu-front"]["spec"]
    assert (budget["minAvailable"], budget["selector"]["matchLabels"]) == (1, labels)
    assert found["Deployment", "shardray-cpu-front"]["spec"]["replicas"] == 1


@pytest.mark.parametrize(
    ("override", "callers"),
    [("gateway.model_name=assistant", {}), ("gateway.allow_unauthenticated=true", {"from": [{"podSelector": {}}]})],
)
def test_a_gateway_reaches_its_port_as_far_as_the_port_asks_who_calls(override: str, callers: Manifest) -> None:
    found = made(overrides=("gateway.listen=0.0.0.0:50061", override))
    [driver] = front_of(found)["containers"]
    assert {"name": "gateway", "containerPort": 50061} in driver["ports"]
    port = {"name": "gateway", "port": 50061, "targetPort": "gateway", "appProtocol": "grpc"}
    assert port in found["Service", "shardray"]["spec"]["ports"]
    rules = found["NetworkPolicy", "shardray-front"]["spec"]["ingress"]
    assert {"ports": [{"port": 50061}], **callers} in rules
    assert not any(port["name"] == "gateway" for port in made()["Service", "shardray"]["spec"]["ports"])


@pytest.mark.parametrize(("hosts_per_pod", "num_pods"), [(2, 3), (5, 1)])
def test_one_worker_may_be_evicted_at_a_time(hosts_per_pod: int, num_pods: int) -> None:
    """As a whole number that has to stay: of a RayCluster Kubernetes cannot ask how many pods there should be."""
    found = made(hosts_per_pod=hosts_per_pod)
    assert found["RayCluster", "shardray"]["spec"]["workerGroupSpecs"][0]["replicas"] == num_pods
    spec = found["PodDisruptionBudget", "shardray-worker"]["spec"]
    assert {key: value for key, value in spec.items() if key != "selector"} == {"minAvailable": num_pods - 1}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("cpu-demo.yaml", {}, "grpc.listen: 127.0.0.1:50051 is reached by nobody outside of its pod; give 0.0.0.0"),
        (
            "kubernetes.yaml",
            {"overrides": ("gateway.listen=127.0.0.1:50061",)},
            "gateway.listen: 127.0.0.1:50061 is reached by nobody outside of its pod; give 0.0.0.0",
        ),
        (
            "kubernetes.yaml",
            {"overrides": ("gateway.listen=10.0.0.1:50061", "gateway.discovery_file=/tmp/workers.json")},
            "gateway.discovery_file: /tmp/workers.json would be in the front's pod",
        ),
        ("kubernetes.yaml", {"overrides": ("grpc.probe_listen=null",)}, "grpc.probe_listen: null, and kubelet asks"),
        ("kubernetes.yaml", {"overrides": ("engine.kv_memory_bytes=null",)}, "engine.kv_memory_bytes: null takes what"),
        ("kubernetes.yaml", {"overrides": ("driver.journal=journal.db",)}, "driver.journal: journal.db has to be in a"),
        (
            "kubernetes.yaml",
            {"overrides": ("driver.journal=/etc/shardray/tls/j.db",)},
            "driver.journal: /etc/shardray/tls/j.db lies beside secrets",
        ),
        (
            "kubernetes.yaml",
            {"overrides": ("model.source=/srv/llama", "engine.device=cuda")},
            "model.source: /srv/llama",
        ),
        ("tensor-8.yaml", {"hosts_per_pod": 4}, "--hosts-per-pod 4: a replica is 8 hosts on one node"),
        (
            "kubernetes.yaml",
            {"hosts_per_pod": 2, "overrides": ("ray.placement_strategy=STRICT_SPREAD",)},
            "--hosts-per-pod 2: every host is on a node of its own",
        ),
        ("kubernetes.yaml", {"name": "Fleet_1"}, "--name Fleet_1: is no name in Kubernetes"),
    ],
)
def test_what_no_manifest_can_be_made_of_is_refused_with_the_fix(
    config: str, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RenderError) as caught:
        manifests(EXAMPLES / config, RenderOptions(**options))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_the_command_prints_manifests_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["render", "kuberay", str(EXAMPLES / "kubernetes.yaml"), "--name", "shardray-cpu"]) == 0
    assert capsys.readouterr().out == rendered("shardray-cpu")
    assert run(["render", "kuberay", str(EXAMPLES / "kubernetes.yaml"), "--memory", "much"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


if __name__ == "__main__":
    for example in RENDERED:
        (DEPLOY / "kuberay" / f"{example}.yaml").write_text(rendered(example), encoding="utf-8")
