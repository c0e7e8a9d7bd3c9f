"""What a rank needs of its device's memory, and how many KV pages fit into the rest.

The one place where memory is reckoned: hosts size their pages by it, scales are refused by it, `shardray plan` shows it
before anything is started.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from shardray.parallel.plan import ShardPlan
from shardray.runtime.engine.served import ServedSpec
from shardray.runtime.model.attention import KVPages
from shardray.runtime.model.parameters import num_cached_layers, num_copied_elements, num_owned_elements

_GIB = 1 << 30
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
    spec, item_bytes = served.spec, served.dtype.itemsize
    num_kv_heads, head_dim = len(plan.kv_heads[tp_rank]), spec.attention.head_dim
    num_elements = num_owned_elements(spec, plan, stage, tp_rank)
    if is_packed:
        num_elements += num_copied_elements(spec, plan, stage, tp_rank)
    one_layer = KVPages.page_bytes(1, served.block_size, num_kv_heads, head_dim, served.dtype)
    return RankMemory(
        page_bytes=one_layer * num_cached_layers(spec, plan, stage),
        block_size=served.block_size,
        max_model_len=served.max_model_len,
        max_num_seqs=served.max_num_seqs,
        max_prompt_len=served.max_prompt_len,
        weight_bytes=num_elements * item_bytes,
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
    return int(served.max_num_batched_tokens * widest * max(served.dtype.itemsize, 4)) + logits


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


def choose_num_pages(memory: RankMemory, grant: MemoryGrant, device: torch.device) -> int:
    """Pages for one rank. Raises MemoryError if not even one full-length sequence fits, with the numbers."""
    if memory.page_bytes == 0:
        return memory.most_pages
    room_bytes = grant.kv_memory_bytes
    if room_bytes is None and device.type == "cuda":
        room_bytes = room_on_gpu(*torch.cuda.mem_get_info(device), memory, grant)
    elif room_bytes is None:
        room_bytes = room_on_cpu(available_bytes(), memory, grant)
    num_pages = memory.num_pages(room_bytes)
    if num_pages < memory.pages_of_one:
        raise MemoryError(
            f"the KV cache of {max(0, room_bytes) / _GIB:.2f} GiB holds {num_pages * memory.block_size} tokens, less "
            f"than one sequence of max_model_len {memory.max_model_len}{_and_prompt(memory)}; lower "
            f"model.max_model_len, raise engine.memory_utilization or engine.kv_memory_bytes, or use more shards"
        )
    return num_pages


def _and_prompt(memory: RankMemory) -> str:
    return f" and a prompt of {memory.max_prompt_len} tokens" if memory.max_prompt_len else ""


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU, used or not; 0 for a CPU, which has none of its own."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0


def held_bytes(device: torch.device) -> int:
    """What this process holds of a device: what PyTorch has reserved, or on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Give back what the allocator keeps of freed memory: after loading that is much, and not needed again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


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
