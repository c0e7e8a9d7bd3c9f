"""Makes the environments of the peers that do not run in the harness's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kinds import KINDS, Kind

_CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


class PeerError(RuntimeError):
    """A peer that could not be installed."""


def make_environment(kind: Kind) -> None:
    """A virtual environment with the kind's packages. Does nothing if it exists; raises PeerError."""
    if kind.environment_dir.exists():
        print(f"{kind.name}: {kind.environment_dir} is there", file=sys.stderr)
        return
    print(f"{kind.name}: installing {', '.join(kind.packages)} into {kind.environment_dir}", file=sys.stderr)
    partial = kind.environment_dir.with_name(f"{kind.environment_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", partial], check=True)
        # Some are built here, for this machine's instructions: a ready-made wheel has to do without many of them.
        pip = [str(partial / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", *kind.packages, *_pins(kind)], check=True)
        if kind.without:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *kind.without], check=True)
        partial.rename(kind.environment_dir)
    except subprocess.CalledProcessError as error:
        hint = "some are compiled here, which needs a C++ compiler; pip says above what is missing"
        raise PeerError(f"{kind.name}: could not install {', '.join(kind.packages)} ({hint})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pins(kind: Kind) -> list[str]:
    """``name==version``, as in constraints.txt."""
    lines = _CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in kind.pinned]


def make_environments(names: Sequence[str] = ()) -> None:
    """Of all peers, or of those named. Raises PeerError."""
    peers = {kind.name: kind for kind in KINDS.values() if kind.is_peer}
    if unknown := sorted(set(names) - set(peers)):
        raise PeerError(f"{unknown[0]!r} is no peer; known: {', '.join(peers)}")
    for name in names or peers:
        make_environment(peers[name])
