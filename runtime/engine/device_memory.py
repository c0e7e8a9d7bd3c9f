"""What a device has and holds, and the pages that a rank takes of it."""

from __future__ import annotations

import psutil
import torch

from shardray.runtime.engine.memory import MemoryGrant, RankMemory, available_bytes, room_on_cpu, room_on_gpu

_GIB = 1 << 30


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
