"""What a rank needs of its device's memory, and how many KV pages fit into the rest.

The one place where memory is reckoned: hosts size their pages by it, scales are refused by it, `shardray plan` shows it
before anything is started. What devices have: ``device_memory.py``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import psutil

from shardray.parallel import huge_pages
from shardray.parallel.plan import ShardPlan
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.parameters import num_cached_layers, num_copied_elements, num_owned_bytes

_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class RankMemory:
    """What one rank needs, in bytes, and what its pages have to hold at least and at most."""

    page_bytes: int  # 0 if it keeps no keys and values
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_prompt_len: int = 0  # of prompts that an encoder reads, and that have pages of their own
    weight_bytes: int = 0
    encoder_bytes: int = 0  # the pages in which an encoder reads the prompts of one step
    step_bytes: int = 0  # what the activations of one step may take

    @property
    def pages_of_one(self) -> int:
        """Pages of one full-length sequence."""
        return -(-self.max_model_len // self.block_size) - (-self.max_prompt_len // self.block_size)

    @property
    def most_pages(self) -> int:
        """More than this can never be in use."""
        return self.pages_of_one * self.max_num_seqs

    @property
    def loaded_bytes(self) -> int:
        """In use once the rank has loaded, before it takes its pages."""
        return self.weight_bytes + self.encoder_bytes

    @property
    def sequence_bytes(self) -> int:
        """Keys and values of one full-length sequence: the least that a rank may keep."""
        return self.page_bytes * self.pages_of_one

    def num_pages(self, room_bytes: int) -> int:
        """Pages that fit into ``room_bytes``; may be too few for one sequence."""
        return self.most_pages if self.page_bytes == 0 else max(0, min(room_bytes // self.page_bytes, self.most_pages))


def rank_memory(served: ServedSpec, plan: ShardPlan, stage: int, tp_rank: int, is_packed: bool) -> RankMemory:
    """What the rank of ``stage`` and ``tp_rank`` needs. ``is_packed``: see ``parallel/layers.py``."""
    spec, item_bytes = served.spec, served.item_bytes
    num_kv_heads, head_dim = len(plan.kv_heads[tp_rank]), spec.attention.head_dim
    weight_bytes = num_owned_bytes(spec, plan, stage, tp_rank, item_bytes)
    if is_packed:
        weight_bytes += num_copied_elements(spec, plan, stage, tp_rank) * item_bytes
    one_layer = 2 * served.block_size * num_kv_heads * head_dim * item_bytes  # of a page: keys and values
    return RankMemory(
        page_bytes=one_layer * num_cached_layers(spec, plan, stage),
        block_size=served.block_size,
        max_model_len=served.max_model_len,
        max_num_seqs=served.max_num_seqs,
        max_prompt_len=served.max_prompt_len,
        weight_bytes=weight_bytes,
        encoder_bytes=one_layer * num_encoder_pages(served),
        step_bytes=_step_bytes(served),
    )


def num_encoder_pages(served: ServedSpec) -> int:
    """Room for the prompts of one step."""
    if served.spec.encoder is None:
        return 0
    return served.max_num_batched_tokens // served.block_size + served.max_num_seqs


def _step_bytes(served: ServedSpec) -> int:
    """An upper estimate of what one step's activations take: the widest layer's inputs and outputs, and the logits."""
    spec = served.spec
    widest = 4 * spec.hidden_size + 3 * spec.widest_mlp + 3 * spec.attention.num_heads * spec.attention.head_dim
    logits = 3 * 4 * served.max_num_seqs * spec.vocab_size
    return int(served.max_num_batched_tokens * widest * max(served.item_bytes, 4)) + logits


@dataclass(frozen=True)
class MemoryGrant:
    """What the operator lets the rank of a mesh have."""

    memory_utilization: float
    kv_memory_bytes: int | None = None  # for pages, whatever is free
    num_ranks_here: int = 1  # ranks that share this memory


def room_on_gpu(free_bytes: int, total_bytes: int, memory: RankMemory, grant: MemoryGrant) -> int:
    """For pages on a device of its own: what is free once weights are loaded, less what is to stay free and a step."""
    return int(free_bytes - (1.0 - grant.memory_utilization) * total_bytes) - memory.step_bytes


def room_on_cpu(available_bytes: int, memory: RankMemory, grant: MemoryGrant) -> int:
    """For pages in memory that ranks share: a part of what is left once all of them have loaded, less a step."""
    return int(available_bytes * grant.memory_utilization) // grant.num_ranks_here - memory.step_bytes


def trim_heap() -> None:
    """Give back what the allocator keeps of freed memory: after loading that is much, and not needed again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def has_huge_pages(is_shared: bool) -> bool:
    """Whether Linux has them for memory of one process, or for memory that several share."""
    return huge_pages.can_be_shared() if is_shared else huge_pages.are_there()


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this machine has left, or less if the container that this process runs in may not use so much."""
    left = int(psutil.virtual_memory().available)
    for limit_file, used_file, stat_file, cached_field in _CGROUP_FILES:
        try:
            limit, used = (cgroup / limit_file).read_text().strip(), int((cgroup / used_file).read_text())
            stat = dict(line.split() for line in (cgroup / stat_file).read_text().splitlines())
        except OSError:
            continue  # another version of cgroups, or none
        if limit != "max":
            left = min(left, int(limit) - used + int(stat.get(cached_field, 0)))  # cached files are given up on demand
    return max(0, left)
