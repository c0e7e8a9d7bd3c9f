"""The files in deploy/ are what they say: settings that load, a cluster file that Ray accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from shardray.runtime.config import config_schema, load_config

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
EXAMPLES = sorted((DEPLOY / "examples").glob("*.yaml"))
CLUSTERS = sorted(DEPLOY.glob("ray-cluster*.yaml"))
RAY_SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
NUM_HOSTS = {
    "cpu-demo": 2,
    "embeddings": 1,
    "gateway": 2,
    "kubernetes": 4,
    "one-gpu": 1,
    "secure": 2,
    "tensor-8": 8,
    "three-unlike-gpus": 3,
    "two-nodes-pipeline": 16,
}


def test_every_example_is_known_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(NUM_HOSTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_takes_the_hosts_it_promises(path: Path) -> None:
    assert load_config(path).parallel.num_hosts == NUM_HOSTS[path.stem]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_passes_the_schema_that_editors_use(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), config_schema())


def test_the_unlike_gpus_share_by_weight() -> None:
    assert load_config(DEPLOY / "examples" / "three-unlike-gpus.yaml").parallel.tensor_split == (2.0, 1.0, 1.0)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_file_passes_rays_own_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), RAY_SCHEMA)


def test_a_cluster_file_that_ray_does_not_know_would_be_found() -> None:
    cluster = yaml.safe_load(CLUSTERS[0].read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_wrokers": 1}, RAY_SCHEMA)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_lets_nobody_in_without_the_token_of_the_cluster(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cluster = yaml.safe_load(text)
    assert f"/home/{cluster['auth']['ssh_user']}/.ray/auth_token" in cluster["file_mounts"]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    asked = [command.startswith("export RAY_AUTH_MODE=token") for command in starts if "ray start" in command]
    assert asked == [True, True]
    assert re.findall(r"(\S+) \S+/shardray serve", text) == ['"RAY_AUTH_MODE=token']


def test_a_node_that_is_started_on_demand_is_waited_for() -> None:
    """As long as Ray keeps it idle, at least: starting one, with its drivers and packages, takes many minutes."""
    path = DEPLOY / "ray-cluster-aws.yaml"
    text = path.read_text(encoding="utf-8")
    changes = re.findall(r"--set (\S+?)\"?$", text, re.MULTILINE)
    config = load_config(DEPLOY / "examples" / "tensor-8.yaml", changes)
    assert config.ray.form_timeout_s >= 60 * yaml.safe_load(text)["idle_timeout_minutes"]


def test_there_is_a_cluster_of_ones_own_machines_and_one_in_a_cloud() -> None:
    clusters = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CLUSTERS]
    assert {cluster["provider"]["type"] for cluster in clusters} == {"local", "aws"}
    own = next(cluster for cluster in clusters if cluster["provider"]["type"] == "local")
    assert own["max_workers"] == len(own["provider"]["worker_ips"])
    # Ray's second autoscaler never starts one of these: https://github.com/ray-project/ray/issues/59905
    assert re.search(r"export .*RAY_enable_autoscaler_v2=0\b.*ray start --head", own["head_start_ray_commands"][-1])
    cloud = next(cluster for cluster in clusters if cluster["provider"]["type"] == "aws")
    gpus = sum(kind["resources"]["GPU"] * kind.get("max_workers", 0) for kind in cloud["available_node_types"].values())
    assert gpus >= NUM_HOSTS["tensor-8"]
