"""What ``shardray doctor`` looks at on the machine: ports, memory, files, processor, clock."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardray.runtime.cli.finding import Finding, fail, ok, warn
from shardray.runtime.cli.shard_table import format_bytes
from shardray.runtime.config import Config

_SHM = Path("/dev/shm")
_RAY_STORE_BYTES = 80 << 20  # of a local Ray; see runtime/cluster/ray_session.py
_EXCHANGE_BYTES = 8 << 20  # a rank's two slots for sums; see parallel/mesh.py
_FEW_FILES, _TOO_FEW_FILES = 8192, 1024  # a client's connection is one, Ray needs some hundreds
_TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronized
_TIMEX_BYTES = 256  # more than a struct timex


def check_ports(config: Config) -> Finding:
    """Every address that the configuration listens on."""
    from shardray.runtime.server.listen import ListenError, check_listen

    free = []
    for key, listen in _listens(config):
        try:
            check_listen(key, listen)
        except ListenError as error:
            return fail(f"{key}: {error.reason}", f"--set {key}=HOST:PORT, or end what listens there")
        free.append(f"{key} {listen}")
    return ok(f"free: {', '.join(free)}")


def _listens(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _listens(value, f"{prefix}{field.name}.")
        elif field.name.endswith("listen") and isinstance(value, str):
            yield prefix + field.name, value


def check_shared_memory(config: Config) -> Finding:
    """Ray's object store lies in /dev/shm; what ranks on CPUs exchange lies in files without a name (memfd)."""
    num_hosts = config.parallel.num_hosts
    try:
        fd = os.memfd_create("shardray-doctor")
        os.truncate(fd, num_hosts * _EXCHANGE_BYTES)
        os.close(fd)
    except (OSError, AttributeError) as error:
        return fail(f"no memory without a file can be had ({error})", "allow memfd_create in the container's profile")
    if not _SHM.is_dir():
        return warn("there is no /dev/shm", "mount a tmpfs there: Ray keeps its object store on disk otherwise")
    left = shutil.disk_usage(_SHM).free
    what = f"/dev/shm has {format_bytes(left)} left"
    if config.ray.address == "local" and left < _RAY_STORE_BYTES:
        fix = "start the container with --shm-size=256m or more: Ray keeps its object store on disk otherwise"
        return warn(f"{what}, a local Ray wants {format_bytes(_RAY_STORE_BYTES)}", fix)
    return ok(what)


def check_huge_pages(config: Config) -> Finding:
    """Weights on CPUs are read faster out of them."""
    if config.engine.device == "cuda":
        return ok("not needed on GPUs")
    from shardray.runtime.engine.memory import has_huge_pages

    if not has_huge_pages(is_shared=False):
        fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return warn("Linux gives none: CPUs read weights at two thirds of their rate", fix)
    if config.parallel.replicas > 1 and not has_huge_pages(is_shared=True):
        fix = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or engine.share_weights: true, slower"
        return warn("none for memory that processes share: each replica on CPUs has weights of its own", fix)
    return ok("there are some")


def check_files(config: Config) -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return ok("no limit of open files")
    what = f"at most {hard:,} open files"
    fix = "raise the hard limit: ulimit -Hn 65536, LimitNOFILE= of the unit, --ulimit nofile= of the container"
    if hard < _TOO_FEW_FILES:
        return fail(what, fix)
    return warn(f"{what}, one for every connection", fix) if hard < _FEW_FILES else ok(what)


def check_processor(config: Config) -> Finding:
    """What makes products in bfloat16 fast on CPUs."""
    flags = _processor_flags()
    known = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    found = ", ".join(name for flag, name in known.items() if flag in flags) or "no vector extension that is used"
    if importlib.util.find_spec("numba") is None:
        return warn(
            f"{found}; numba is not installed", "pip install 'shardray[cpu]': CPU hosts are several times faster"
        )
    if not flags & {"avx512_bf16", "amx_bf16"} and _is_bfloat16(config) and config.engine.device == "cpu":
        return warn(f"{found}: bfloat16 is widened before it is multiplied", "model.dtype: float32 may be as fast here")
    return ok(f"{found}; numba is installed")


def _is_bfloat16(config: Config) -> bool:
    return config.model.dtype in ("auto", "bfloat16")


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())


def check_cores(config: Config) -> Finding:
    """Hosts on CPUs that share cores wait for one another in every layer."""
    num_cores, num_hosts = len(os.sched_getaffinity(0)), config.parallel.num_hosts
    threads = config.engine.threads_per_host or max(1, num_cores // num_hosts)
    quota = _cpu_quota()
    what = f"{num_cores} cores" + (f", of which a container's quota allows {quota:g}" if quota is not None else "")
    if config.engine.device == "cuda" or config.ray.address != "local":
        return ok(what)
    if num_hosts * threads > min(num_cores, quota or num_cores):
        fix = "fewer hosts or threads_per_host; hosts with GPUs do not mind"
        return warn(f"{what} for {num_hosts} hosts of {threads} threads", fix)
    return ok(f"{what} for {num_hosts} host{'s' * (num_hosts > 1)} of {threads} thread{'s' * (threads > 1)}")


def _cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    try:
        quota, period = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def check_clock(config: Config) -> Finding:
    """Certificates, deadlines and logs of several machines are compared by it."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state < 0:
        return ok("whether it is synchronized is not told here")
    if state == _TIME_ERROR and config.ray.address != "local":
        return warn("not synchronized with the other nodes'", "run chrony or systemd-timesyncd on every node")
    return ok("not synchronized; one machine needs no more" if state == _TIME_ERROR else "synchronized")
