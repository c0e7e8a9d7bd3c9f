"""What ``shardray doctor`` looks at in the installed software: interpreter, torch, NCCL, Triton, Ray, gRPC."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from shardray.runtime.cli.finding import Finding, fail, ok, warn
from shardray.runtime.config import Config

_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
_OLDEST_RAY = (2, 52)  # the first with token authentication
_COMPILER_S = 60.0
_DRIVER = Path("/proc/driver/nvidia/version")
_STUBS = ("shardray.v1.inference_pb2_grpc", "shardray.v1.control_pb2_grpc")


def check_python(config: Config) -> Finding:
    what = f"{platform.python_implementation()} {platform.python_version()} in {sys.prefix}"
    if sys.version_info < _OLDEST_PYTHON:
        return fail(what, "install Python 3.11 or newer")
    return ok(what)


def check_torch(config: Config) -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    what = f"torch {torch.__version__}, {build}"
    if _release(torch.__version__) < _OLDEST_TORCH:
        return fail(what, "install torch 2.11 or newer")
    if torch.version.cuda is None and (config.engine.device == "cuda" or _DRIVER.exists()):
        fix = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        return fail(f"{what}, but engine.device is cuda", fix) if config.engine.device == "cuda" else warn(what, fix)
    return ok(what)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def check_cuda(config: Config) -> Finding:
    """A product on every device of this machine."""
    import torch

    if not torch.cuda.is_available():
        if config.engine.device == "cuda" and config.ray.address == "local":
            return fail(
                "no CUDA device can be used here", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or engine.device: cpu"
            )
        return ok("no CUDA device here; hosts run on CPUs unless other nodes have GPUs")
    names = []
    for index in range(torch.cuda.device_count()):
        try:
            x = torch.ones(8, 8, device=f"cuda:{index}")
            assert float((x @ x).sum()) == 512.0
        except (RuntimeError, AssertionError) as error:
            return fail(
                f"cuda:{index} does not compute: {str(error).splitlines()[0]}", "reset the device or update its driver"
            )
        names.append(torch.cuda.get_device_name(index))
    what = f"{len(names)} × {', '.join(sorted(set(names)))}"
    if config.ray.address == "local" and config.engine.device != "cpu" and len(names) < config.parallel.num_hosts:
        return fail(f"{what}, {config.parallel.num_hosts} hosts are asked for", "lower the counts in parallel")
    return ok(what)


def check_nccl(config: Config) -> Finding:
    import torch

    if not torch.cuda.is_available():
        return ok("not needed without GPUs: ranks on CPUs talk through shared memory or gloo")
    from torch.cuda import nccl

    version: tuple[int, ...] = nccl.version()  # type: ignore[no-untyped-call]
    return ok("NCCL " + ".".join(map(str, version)))


def check_triton(config: Config) -> Finding:
    """Triton compiles what launches its kernels, in C, when the first one runs: without a compiler no step does."""
    import torch

    if not torch.cuda.is_available() or config.engine.device == "cpu":
        return ok("not needed on CPUs")
    if importlib.util.find_spec("triton") is None:
        fix = "pip install triton, in the version that this torch names"
        return warn("triton is not installed: CUDA kernels run as torch calls, far slower", fix)
    version = importlib.metadata.version("triton")
    if (reason := why_no_c_extension()) is not None:
        fix = "apt-get install gcc libc6-dev and Python's headers (python3-dev), or set CC to a C compiler"
        return fail(f"triton {version}, and {reason}", fix)
    return ok(f"triton {version}, and a C compiler")


def why_no_c_extension() -> str | None:
    """What keeps this machine from compiling an extension of Python, by the compiler that Triton would take."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        include = sysconfig.get_paths()["include"]
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/probe.so"]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_S, check=True)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or ["it says nothing"]
            return f"{compiler} compiles no extension of Python: {lines[0]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} does not run: {error}"
    return None


def check_ray(config: Config) -> Finding:
    """Opens and closes a session, as ``serve`` would."""
    from shardray.runtime.cluster.errors import ClusterError
    from shardray.runtime.cluster.ray_token import choose_token

    choose_token(config.ray)
    from shardray.runtime.cluster.ray_check import ray_version, try_ray

    if _release(ray_version()) < _OLDEST_RAY:
        return fail(f"Ray {ray_version()} ignores RAY_AUTH_MODE=token", "install Ray 2.52 or newer")
    try:
        return ok(f"Ray {ray_version()}, ray.address {config.ray.address}: {try_ray(config)}")
    except ClusterError as error:
        return fail(f"Ray {ray_version()}: {error}", "start Ray on every node, give it room, or use ray.address: local")


def check_ray_token(config: Config) -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if config.ray.address == "local" and mode in ("", "token"):
        return ok("a local Ray gets one that is made for it, and listens on this machine alone")
    if mode != "token":
        fix = "set RAY_AUTH_MODE=token on every node before Ray is started there"
        return warn("off: whoever reaches Ray's ports runs code in the cluster", fix)
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and not path.is_file():
        return fail(f"RAY_AUTH_MODE is token, and there is none in {path}", "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
    return ok("on, and there is a token")


def check_grpc(config: Config) -> Finding:
    """The generated code refuses libraries that are too old when it is imported."""
    names = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf")
    what = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    try:
        for module in _STUBS:
            importlib.import_module(module)
    except (ImportError, RuntimeError, TypeError) as error:
        return fail(f"{what}: {str(error).splitlines()[0]}", "pip install -c constraints.txt shardray")
    return ok(what)


def check_certificates(config: Config) -> Finding:
    """Those of ``cluster.tls``, as they lie on this node."""
    from shardray.runtime.cluster.form import tls_files

    if (files := tls_files(config)) is None:
        return ok("cluster.tls is null: hosts and driver prove with secrets who they are")
    try:
        files.check()
    except ValueError as error:
        return fail(str(error), "put certificates for the DNS name shardray there, signed by cluster.tls.ca")
    return ok(f"{files.cert} is accepted by others with the same authority")
