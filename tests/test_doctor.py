"""`shardray doctor`: what is broken is found, and told with what mends it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from shardray.parallel import huge_pages
from shardray.runtime.cli import machine_checks, model_checks, software_checks
from shardray.runtime.cli.doctor import checks
from shardray.runtime.cli.finding import Status
from shardray.runtime.cluster import ray_check
from shardray.runtime.config import (
    ClusterSettings,
    Config,
    EngineSettings,
    GrpcSettings,
    ModelSettings,
    ParallelSettings,
    RaySettings,
    TlsSettings,
)
from tests.tiny_models import save_llama


@pytest.fixture(autouse=True)
def _environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at Ray chooses a token for it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny"))


def config_of(source: str | Path = "smollm2-135m", **sections: object) -> Config:
    return dataclasses.replace(Config(model=ModelSettings(source=str(source))), **sections)  # type: ignore[arg-type]


def doctor(*arguments: str, limit: str = "") -> tuple[int, dict[str, dict[str, str]]]:
    command = f"{limit}exec {sys.executable} -m shardray doctor --json {' '.join(arguments)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {line["check"]: line for line in json.loads(done.stdout)}


@pytest.mark.integration
def test_a_machine_that_can_serve_passes(tiny: Path) -> None:
    code, found = doctor(
        f"--set model.source={tiny}", "--set engine.kv_memory_bytes=8MiB", "--set grpc.listen=127.0.0.1:0"
    )
    assert (code, {line["status"] for line in found.values()} - {"ok", "warn"}) == (0, set())
    assert list(found) == list(checks(knows_model=True))
    assert found["ray"]["what"].endswith("ray.address local: 1 node, 0 GPUs")
    assert all(line["fix"] for line in found.values() if line["status"] == "warn")


def test_what_keeps_a_fleet_from_running_ends_with_1_and_a_fix_for_each() -> None:
    code, found = doctor("--set ray.address=ray://127.0.0.1:1", limit="ulimit -n 500; ")
    assert code == 1
    assert [name for name, line in found.items() if line["status"] == "fail"] == ["ray", "open files"]
    assert "nothing answers there" in found["ray"]["what"]
    assert found["open files"]["what"] == "at most 500 open files"
    assert "--ulimit nofile=" in found["open files"]["fix"]
    assert "model" not in found


def test_a_port_that_is_taken_is_named_with_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        finding = machine_checks.check_ports(config_of(grpc=GrpcSettings(listen=listen)))
    assert finding.status == Status.FAIL
    assert finding.what.startswith(f"grpc.listen: cannot listen on {listen}: another process listens there")
    assert finding.fix.startswith("--set grpc.listen=")
    assert machine_checks.check_ports(config_of(grpc=GrpcSettings(listen="127.0.0.1:0"))).status == Status.OK


def test_more_threads_than_cores_are_warned_of() -> None:
    crowded = config_of(parallel=ParallelSettings(tensor_parallel_size=64), engine=EngineSettings(threads_per_host=4))
    assert machine_checks.check_cores(crowded).status == Status.WARN
    assert machine_checks.check_cores(config_of()).status == Status.OK


def test_a_cluster_without_token_authentication_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    joined = config_of(ray=RaySettings(address="auto"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert software_checks.check_ray_token(joined).status == Status.WARN
    assert software_checks.check_ray_token(config_of()).status == Status.OK
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert software_checks.check_ray_token(joined).status == Status.FAIL
    (tmp_path / "token").write_text("0" * 32)
    assert software_checks.check_ray_token(joined).status == Status.OK


def test_a_ray_that_knows_no_tokens_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_check, "ray_version", lambda: "2.51.1")
    finding = software_checks.check_ray(config_of())
    assert (finding.status, finding.what) == (Status.FAIL, "Ray 2.51.1 ignores RAY_AUTH_MODE=token")


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    needed = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    for name, oldest in (("torch", software_checks._OLDEST_TORCH), ("ray", software_checks._OLDEST_RAY)):
        assert f'"{name}>={".".join(map(str, oldest))}",' in needed


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "cert", "key")}
    finding = software_checks.check_certificates(config_of(cluster=ClusterSettings(tls=TlsSettings(**paths))))
    assert finding.status == Status.FAIL
    assert ".pem" in finding.what


def test_a_gpu_that_is_asked_for_and_not_there_is_a_failure() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    wanted = config_of(engine=EngineSettings(device="cuda"))
    assert software_checks.check_cuda(wanted).status == Status.FAIL
    assert software_checks.check_cuda(config_of()).status == Status.OK


def test_gpus_without_a_compiler_for_triton_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container of Python alone lacks: every kernel's first launch would end the host."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    without = software_checks.check_triton(config_of())
    assert (without.status, without.what.partition(", and ")[2]) == (Status.FAIL, "there is no C compiler")
    assert "gcc libc6-dev" in without.fix
    assert software_checks.check_triton(config_of(engine=EngineSettings(device="cpu"))).status == Status.OK


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler here")
def test_a_compiler_is_tried_on_what_triton_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert software_checks.why_no_c_extension() is None
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in (software_checks.why_no_c_extension() or "")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert "does not run" in (software_checks.why_no_c_extension() or "")


def test_a_model_is_looked_at_without_reading_it(tiny: Path, tmp_path: Path) -> None:
    whole = model_checks.check_model(config_of(tiny))
    assert (whole.status, whole.fix[:36]) == (Status.WARN, "requests have to bring token ids; pu")
    missing = model_checks.check_model(config_of(tmp_path / "nothing"))
    assert (missing.status, missing.fix) == (Status.FAIL, f"shardray pull {tmp_path / 'nothing'}")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-100])
    cut_short = model_checks.check_model(config_of(tmp_path))
    assert cut_short.status == Status.FAIL
    assert "fetch it again" in cut_short.what
    stages = config_of(tiny, parallel=ParallelSettings(pipeline_parallel_size=9))
    assert "5 layers can be cut into 1 to 5 stages" in model_checks.check_model(stages).what


def test_memory_that_is_too_small_is_told_with_what_helps(tiny: Path) -> None:
    finding = model_checks.check_memory(config_of(tiny, engine=EngineSettings(kv_memory_bytes=1000)))
    assert (finding.status, "raise engine.kv_memory_bytes to" in finding.fix) == (Status.FAIL, True)
    assert model_checks.check_memory(config_of(tiny)).status == Status.OK


def test_a_check_that_breaks_is_a_failure_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardray.runtime.cli.doctor import _run

    def broken(config: Config) -> object:
        raise ImportError("libsomething.so: cannot open shared object file")

    finding = _run(broken, config_of())  # type: ignore[arg-type]
    assert finding.status == Status.FAIL
    assert finding.what == "ImportError: libsomething.so: cannot open shared object file"


@pytest.mark.parametrize(
    ("own", "shared", "replicas", "status"),
    [
        ("always [madvise] never", "always [never]", 1, Status.OK),
        ("always [madvise] never", "always [never]", 2, Status.WARN),
        ("always [madvise] never", "[advise] never", 2, Status.OK),
        ("always madvise [never]", "[advise] never", 1, Status.WARN),
    ],
)
def test_huge_pages_are_asked_for_where_weights_would_be_read_faster(
    own: str, shared: str, replicas: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("_OWN_MEMORY", own), ("_SHARED_MEMORY", shared)):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(huge_pages, name, tmp_path / name)
    huge_pages.can_be_shared.cache_clear()
    try:
        found = machine_checks.check_huge_pages(config_of(parallel=ParallelSettings(replicas=replicas)))
    finally:
        huge_pages.can_be_shared.cache_clear()
    assert found.status is status
    assert bool(found.fix) == (status is Status.WARN)
