"""A host's place in a mesh, and what the shard formed there reports: plain data, free of torch."""

from __future__ import annotations

import msgspec

from shardray.parallel.credentials import Credentials
from shardray.parallel.tls import TlsFiles


class ShardAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """A host's place in a mesh, as plain data."""

    epoch: str  # names the mesh; a frame of another epoch is dropped
    secret: str  # carried by every hello
    tls: TlsFiles | None = None  # where the certificates for its connections lie
    rank: int  # stage * tp_size + tp_rank
    tp_size: int
    pp_size: int
    nodes: tuple[str, ...]  # node id of every rank; equal ids share a machine
    store_host: str
    store_port: int
    bind_host: str  # address on which this rank listens
    device: str  # "cpu", "cuda:0"
    num_threads: int = 1
    cpu_ids: tuple[int, ...] = ()  # pin to these cores; empty: do not pin
    step_timeout_s: float = 30.0
    form_timeout_s: float = 120.0  # of each wait for the other ranks while the mesh forms
    model_dir: str
    dtype: str  # "float32", "bfloat16", "float16"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_prefill_beside_decodes: int | None = None  # None: by the device
    max_draft_tokens: int = 0
    prefix_caching: bool = True
    block_size: int = 16
    memory_utilization: float = 0.9
    kv_memory_bytes: int | None = None  # of this rank
    tensor_split: tuple[float, ...] | None = None
    stage_layers: tuple[int, ...] | None = None
    expert_parallel: bool = False
    share_weights: bool | None = False  # with others of this machine, on CPUs; None: where that costs no speed
    record_steps: bool | None = None  # None: where that makes decode steps faster

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.epoch, self.secret, self.tls)


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a formed shard reports; for `status`."""

    rank: int
    stage: int
    tp_rank: int
    host: str
    pid: int
    device: str
    first_layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    weight_bytes: int
    kv_bytes: int
    num_kv_tokens: int
    device_bytes: int = 0  # memory of its GPU, used or not; 0 on a CPU


class ShardLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard has done since it was formed, and what it holds now."""

    num_steps: int = 0
    busy_s: float = 0.0  # within steps: computing, and waiting for the other ranks
    memory_bytes: int = 0  # of its device, reserved by it; on a CPU, of its process, less weights that another loaded
