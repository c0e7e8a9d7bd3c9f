"""Generate the Python code beside the .proto files; ``--check`` fails if what is there is not what would be generated.

Needs ``grpcio-tools`` and ``mypy-protobuf`` in the environment that runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

PROTO_ROOT = Path(__file__).resolve().parent
PACKAGE = Path("shardray/v1")


def generate(out_dir: Path) -> None:
    """Write messages, services and their type stubs under ``out_dir``."""
    # The stub generators are looked up on PATH; they live beside the interpreter, also when its venv is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    well_known = resources.files("grpc_tools") / "_proto"
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    sources = sorted(str(path) for path in (PROTO_ROOT / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={out_dir}" for kind in kinds]
    status = protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


def stale_files() -> list[str]:
    """Names of generated files that are missing, out of date or left over."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = _read(Path(folder) / PACKAGE)
    present = _read(PROTO_ROOT / PACKAGE)
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in ("*.py", "*.pyi") for path in folder.glob(pattern)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the generated code is stale")
    if not parser.parse_args().check:
        generate(PROTO_ROOT)
    elif stale := stale_files():
        raise SystemExit(f"stale generated code: {', '.join(stale)}; run: make proto")


if __name__ == "__main__":
    main()
