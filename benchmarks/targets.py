"""What shardray is meant to reach, each as a ratio between contestants of one run."""

from __future__ import annotations

from dataclasses import dataclass

PEERS = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class Target:
    """``metric`` of ``contestant`` over that of the best of ``rivals`` in the same round.

    A peer stands for all of its variants that took part: ``llama.cpp`` also for ``llama.cpp:dtype=float16``.
    """

    what: str
    workload: str
    metric: str
    contestant: str
    rivals: tuple[str, ...]
    at_least: float
    lower_is_better: bool = False  # then the ratio is the other way round: above 1 is better still

    def is_rival(self, label: str) -> bool:
        return label in self.rivals or any(label.startswith(f"{rival}:") for rival in self.rivals if rival in PEERS)

    def ratio(self, own: float, rivals: list[float]) -> float:
        return min(rivals) / own if self.lower_is_better else own / max(rivals)


_TP2, _TP1 = "shardray:tp=2,threads=1", "shardray:threads=1"
_SERVED_TP2, _SERVED_TP1 = "served:tp=2,threads=1", "served:threads=1"

TARGETS = (
    Target("decode, over transformers", "single", "decode_tok_s", "shardray", ("transformers",), 1.7),
    Target("output, over the best peer", "concurrent", "output_tok_s", "shardray", ("transformers", "llama.cpp"), 1.3),
    Target("first token, transformers' over ours", "single", "ttft_s", "shardray", ("transformers",), 1.0, True),
    Target("decode, gRPC over in process", "single", "decode_tok_s", "served", ("shardray",), 0.95),
    Target("output, gRPC over in process", "concurrent", "output_tok_s", "served", ("shardray",), 0.95),
    Target("decode, 2 tensor ranks over 1", "single", "decode_tok_s", _TP2, (_TP1,), 1.5),
    Target("output, 2 tensor ranks over 1", "concurrent", "output_tok_s", _TP2, (_TP1,), 1.5),
    Target("decode, the same over gRPC", "single", "decode_tok_s", _SERVED_TP2, (_SERVED_TP1,), 1.5),
    Target("output, the same over gRPC", "concurrent", "output_tok_s", _SERVED_TP2, (_SERVED_TP1,), 1.5),
)
