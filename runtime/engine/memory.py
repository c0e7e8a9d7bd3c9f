"""How many KV pages fit: into what weights and activations leave of the device, or into what the operator grants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_GIB = 1 << 30
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


@dataclass(frozen=True)
class PageBudget:
    """What one rank knows when it sizes its pages."""

    page_bytes: int  # on this rank; 0 if it holds no KV head
    block_size: int
    max_model_len: int
    max_num_seqs: int
    num_ranks_here: int  # ranks that share this memory
    step_bytes: int  # what the activations of one step may take
    memory_utilization: float
    kv_memory_bytes: int | None
    max_prompt_len: int = 0  # of prompts that an encoder reads, and that have pages of their own

    @property
    def pages_of_one(self) -> int:
        """Pages of one full-length sequence."""
        return -(-self.max_model_len // self.block_size) - (-self.max_prompt_len // self.block_size)

    @property
    def most_pages(self) -> int:
        """More than this can never be in use."""
        return self.pages_of_one * self.max_num_seqs


def choose_num_pages(budget: PageBudget, device: torch.device) -> int:
    """Pages for one rank. Raises MemoryError if not even one full-length sequence fits, with the numbers."""
    if budget.page_bytes == 0:
        return budget.most_pages
    memory_bytes = budget.kv_memory_bytes
    if memory_bytes is None:
        memory_bytes = _free_bytes(budget, device)
    num_pages = min(memory_bytes // budget.page_bytes, budget.most_pages)
    if num_pages < budget.pages_of_one:
        room = max(0, num_pages) * budget.block_size
        raise MemoryError(
            f"the KV cache of {max(0, memory_bytes) / _GIB:.2f} GiB holds {room} tokens, less than one sequence of "
            f"max_model_len {budget.max_model_len}{_and_prompt(budget)}; lower model.max_model_len, raise "
            f"engine.memory_utilization or engine.kv_memory_bytes, or use more shards"
        )
    return num_pages


def _and_prompt(budget: PageBudget) -> str:
    return f" and a prompt of {budget.max_prompt_len} tokens" if budget.max_prompt_len else ""


def _free_bytes(budget: PageBudget, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        left = int(free - (1.0 - budget.memory_utilization) * total)
    else:
        left = int(available_bytes() * budget.memory_utilization) // budget.num_ranks_here
    return left - budget.step_bytes


def held_bytes(device: torch.device) -> int:
    """What this process holds of a device: what PyTorch has reserved, or on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


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
