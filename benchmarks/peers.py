"""Makes the environments of the peers that do not run in the harness's own."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.kinds import KINDS, Kind


class PeerError(RuntimeError):
    """A peer that could not be installed."""


def make_environment(kind: Kind) -> None:
    """A virtual environment with the kind's packages. Does nothing if it exists; raises PeerError."""
    if kind.environment_dir.exists():
        print(f"{kind.name}: {kind.environment_dir} is there", file=sys.stderr)
        return
    print(f"{kind.name}: installing {', '.join(kind.packages)} into {kind.environment_dir}", file=sys.stderr)
    partial = kind.environment_dir.with_name(f"{kind.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", partial], check=True)
        # Built here, for this machine's instructions: a ready-made wheel would have to do without many of them.
        subprocess.run([partial / "bin" / "pip", "install", "--quiet", *kind.packages], check=True)
        partial.rename(kind.environment_dir)
    except subprocess.CalledProcessError as error:
        hint = "some are compiled here, which needs a C++ compiler; pip says above what is missing"
        raise PeerError(f"{kind.name}: could not install {', '.join(kind.packages)} ({hint})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_environments() -> None:
    for kind in KINDS.values():
        if kind.packages:
            make_environment(kind)
