"""The model in the formats of the peers that read no safetensors, and with weights of 8 bits ("int8") in each of them;
written once, kept beside their environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gguf_writing import content_digest, gguf_of
from benchmarks.kinds import PEERS_DIR, Contestant
from benchmarks.protocol import INT8

_REPOSITORY = Path(__file__).parent.parent


def options_for(contestant: Contestant, python: Path, model_dir: Path, dtype: str) -> dict[str, str]:
    """Its label's options, and where the model is in the contestant's own format. Raises ValueError."""
    dtype = contestant.options.get("dtype", dtype)
    if contestant.kind.name == "llama.cpp":
        return contestant.options | {"gguf": str(gguf_of(model_dir, dtype, PEERS_DIR / "gguf"))}
    if dtype == INT8 and not contestant.kind.is_peer:
        return contestant.options | {"quantized": str(_quantized(model_dir))}
    if contestant.kind.converts:
        return contestant.options | {"converted": str(_converted(contestant, python, model_dir, dtype))}
    return contestant.options


def _quantized(model_dir: Path) -> Path:
    from shardray.runtime.model.model_cache import build_folder
    from shardray.runtime.model.quantize import quantize_folder

    target = PEERS_DIR / "models" / f"shardray-{model_dir.name}-{content_digest(model_dir)}-{INT8}"
    return build_folder(target, lambda folder: quantize_folder(model_dir, folder))


def _converted(contestant: Contestant, python: Path, model_dir: Path, dtype: str) -> Path:
    kind = contestant.kind
    target = PEERS_DIR / "models" / f"{kind.name}-{model_dir.name}-{content_digest(model_dir)}-{dtype}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {target} ...", file=sys.stderr)
        command = [str(python), "-m", f"benchmarks.contestants.{kind.converts}", str(model_dir), dtype, str(target)]
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"{contestant.label}: could not convert {model_dir.name}: {reason}")
    return target
