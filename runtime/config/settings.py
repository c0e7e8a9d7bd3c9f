"""What a fleet can be told, as frozen dataclasses. Checked once, where they are made; never changed afterwards.

The docstring below each field is the description that ``shardray schema`` hands to editors.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal, NoReturn

from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from shardray.runtime.config.gateway import GatewaySettings
from shardray.runtime.config.observed import LoggingSettings, MetricsSettings, TracingSettings
from shardray.runtime.config.units import (
    STRICT_KEYS,
    Bytes,
    Count,
    CountOrZero,
    Flag,
    Fraction,
    Listen,
    NonNegative,
    Positive,
    RayAddress,
    Text,
    is_loopback,
    parse_listen,
)


def _refuse(key: str, value: Any, message: str) -> NoReturn:
    """Refuse one key of a section because of what another key says."""
    raise PydanticCustomError("cross_field", "{message}", {"key": key, "value": value, "message": message})


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class ModelSettings:
    """Which weights to serve, and how."""

    source: Text
    """A name `shardray pull` knows (smollm2-135m), a hub id (org/name), a folder, or a .gguf file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV pages; auto takes the checkpoint's."""
    max_model_len: Count | None = None
    """Context window in tokens, prompt and output together; null takes the model's own."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""

    @property
    def identity(self) -> str:
        """The weights and their type, by name: what the tokens of a request depend on."""
        return f"{self.source} revision {self.revision} {self.dtype}"


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class ParallelSettings:
    """How many shards, and how the decoder is cut. No count has to divide another."""

    tensor_parallel_size: Count = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: Count = 1
    """Stages that the layers are divided over."""
    replicas: Count = 1
    """Independent copies of the tensor × pipeline mesh."""
    tensor_split: tuple[Positive, ...] | None = None
    """Relative share of each tensor rank, e.g. [2, 1, 1] for unlike GPUs; null cuts evenly."""
    stage_layers: tuple[Count, ...] | None = None
    """Number of layers of each stage, e.g. [10, 12]; null balances them by cost."""
    expert_parallel: bool = False
    """Whether a mixture's experts go to tensor ranks as a whole; otherwise each is cut like any MLP."""

    def __post_init__(self) -> None:
        self._check_length("tensor_split", self.tensor_split, "tensor_parallel_size", "one share for each tensor rank")
        self._check_length("stage_layers", self.stage_layers, "pipeline_parallel_size", "one count for each stage")

    def _check_length(self, key: str, entries: tuple[Any, ...] | None, size_key: str, meaning: str) -> None:
        size = getattr(self, size_key)
        if entries is not None and len(entries) != size:
            has = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
            _refuse(key, list(entries), f"has {has}, but {size_key} is {size}; give {meaning}")

    @property
    def tp_size(self) -> int:
        return self.tensor_parallel_size

    @property
    def pp_size(self) -> int:
        return self.pipeline_parallel_size

    @property
    def hosts_per_replica(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def num_hosts(self) -> int:
        return self.hosts_per_replica * self.replicas


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class EngineSettings:
    """Batching, KV memory and device of each replica."""

    max_num_seqs: Count = 64
    """Requests that run at the same time in one replica."""
    max_num_batched_tokens: Count = 2048
    """Tokens of one step, prefill chunks and decodes together; more than max_num_seqs."""
    max_prefill_beside_decodes: Count | None = None
    """Tokens of prompts in a step in which others decode; null: 64 on CPUs, 512 on GPUs. Fewer keep streams steady.
    Up to four times as many are read while that many more requests wait than run."""
    max_draft_tokens: CountOrZero = 0
    """Tokens of a request that a step may guess, and check, where its text repeats; 0: none. The tokens stay the same.
    Steps of few streams then yield several tokens of each: 7 or 15 suit quoting, editing and code."""
    prefix_caching: Flag = True
    """Whether requests that begin with the same tokens share what was computed of them, as long as pages are left."""
    memory_utilization: Fraction = 0.9
    """Share of each device's memory that weights, activations and KV pages may take."""
    kv_memory_bytes: Bytes | None = None
    """KV memory of each host, e.g. 2GiB; null takes what memory_utilization leaves after the weights."""
    block_size: Count = 16
    """Tokens of one KV page."""
    step_timeout_s: Positive = 30.0
    """Seconds after which a rank that does not answer within a step counts as failed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the shards run; auto takes cuda if the host has it."""
    threads_per_host: Count | None = None
    """CPU threads of each host; null divides the machine's cores among its hosts."""
    share_weights: Flag | None = None
    """Whether replicas on one machine's CPUs keep weights once; null: where Linux gives shared memory huge pages."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            message = (
                f"has to exceed max_num_seqs {self.max_num_seqs}, so that a step full of decodes has room for "
                "a prompt; raise it or lower max_num_seqs"
            )
            _refuse("max_num_batched_tokens", self.max_num_batched_tokens, message)


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class GrpcTlsSettings:
    """PEM files of the public port. They are read again when they change; streams that run go on."""

    cert: Text
    """Certificate that clients are shown, for the names that they connect to, with what lies below its authority."""
    key: Text
    """Its private key, not encrypted; a file that other users may read is refused."""
    client_ca: Text | None = None
    """Authority that has to have signed the certificate that each client shows; null asks clients for none."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class GrpcAuthSettings:
    """Who may call. Health is exempt."""

    tokens: Text
    """File with a line for each token: name, roles, token, limits (docs/security.md); read again when it changes."""
    share_prefixes: Flag = False
    """Whether prompts of different callers share what was computed of them; each can then learn how others' begin."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class GrpcSettings:
    """The public gRPC port."""

    listen: Listen = "127.0.0.1:50051"
    """Address to listen on; 0.0.0.0 accepts other machines, port 0 takes a free port."""
    tls: GrpcTlsSettings | None = None
    """Certificates; null listens in plain text."""
    auth: GrpcAuthSettings | None = None
    """Tokens that clients show; null lets everyone in who can connect."""
    allow_unauthenticated: Flag = False
    """Whether an address that other machines reach may go without auth and without tls.client_ca."""
    probe_listen: Listen | None = None
    """Second address, in plain text, that answers health checks and nothing else; null: there is none."""
    reflection: Flag | None = None
    """Whether tools such as grpcurl may list the services; null: only where everyone is let in."""
    max_message_bytes: Bytes = 4 * 1024 * 1024
    """Largest message that a client may send, and largest answer to Embed."""
    kserve: Flag = False
    """Whether clients of Triton are answered too (KServe's inference.GRPCInferenceService). Needs shardray[kserve]."""
    log_prompts: Flag = False
    """Whether prompts and outputs are written to the log, for debugging; otherwise it has request ids only."""

    def __post_init__(self) -> None:
        if not (self.asks_who_calls or self.allow_unauthenticated or is_loopback(self.listen)):
            message = (
                "is reached by other machines and lets everyone in; set grpc.auth.tokens or grpc.tls.client_ca, "
                "or listen on 127.0.0.1, or say grpc.allow_unauthenticated: true"
            )
            _refuse("listen", self.listen, message)

    @property
    def asks_who_calls(self) -> bool:
        """Whether a client has to show a token or a certificate."""
        return self.auth is not None or (self.tls is not None and self.tls.client_ca is not None)

    @property
    def reflects(self) -> bool:
        return not self.asks_who_calls if self.reflection is None else self.reflection


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class LimitsSettings:
    """Bounds that protect the fleet from its clients."""

    max_queued_requests: Count = 256
    """Requests that may wait; the next one is refused with RESOURCE_EXHAUSTED."""
    max_queued_tokens: Count = 1_000_000
    """Tokens that the requests that wait may have together; once they have, the next one is refused."""
    default_deadline_s: Positive = 600.0
    """Seconds that a request may take if its client sets no deadline."""
    max_deadline_s: Positive = 3600.0
    """Longest deadline in seconds; longer ones are shortened to it."""
    shutdown_grace_s: NonNegative = 10.0
    """Seconds that running requests get to end after SIGTERM or Ctrl-C."""

    def __post_init__(self) -> None:
        if self.default_deadline_s > self.max_deadline_s:
            message = f"exceeds max_deadline_s {self.max_deadline_s:g}; lower it or raise max_deadline_s"
            _refuse("default_deadline_s", self.default_deadline_s, message)


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class RaySettings:
    """Where the hosts are placed."""

    address: RayAddress = "local"
    """local starts Ray on this machine; auto joins the cluster this machine belongs to; ray://host:port another."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How the hosts of one replica are laid over the nodes (Ray placement group strategy)."""
    form_timeout_s: Positive = 180.0
    """Seconds without progress (placing hosts, loading weights) after which a replica is given up, with the reason."""
    namespace: Text = "shardray"
    """Ray namespace; give each fleet on one cluster its own."""
    cpus_per_host: Positive = 1.0
    """CPUs that Ray reserves for each host."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class TlsSettings:
    """PEM files for the connections inside the cluster, at the same paths on every node."""

    ca: Text
    """Certificate of the authority that signed the certificate of every node."""
    cert: Text
    """This node's certificate, for the DNS name shardray, as server and as client."""
    key: Text
    """Its private key, not encrypted; it is read where it lies and sent nowhere."""

    def __post_init__(self) -> None:
        for key in ("ca", "cert", "key"):
            if not os.path.isabs(getattr(self, key)):
                _refuse(key, getattr(self, key), "is no absolute path, and hosts run in other folders")


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class ClusterSettings:
    """How the fleet keeps itself alive."""

    spares: CountOrZero = 0
    """Hosts that wait with the runtime imported, to take the place of one that is lost."""
    degrade: Flag = False
    """Whether a replica may run in a smaller shape while the cluster lacks room for the configured one."""
    max_failed_forms: Count = 6
    """Forms in a row that may fail before a replica is given up, with the last error. Lack of room never counts."""
    lease_s: Positive = 60.0
    """Seconds that hosts outlive a driver that is silent; within them a restarted driver takes them over."""
    tls: TlsSettings | None = None
    """Certificates with which driver and hosts prove to each other who they are; null: they have secrets only."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class AutoscalingSettings:
    """More replicas under load, fewer without; parallel.replicas is the start. Keys as in Ray Serve."""

    min_replicas: Count = 1
    """Fewest replicas."""
    max_replicas: Count | None = None
    """Most replicas; null leaves their number alone."""
    target_ongoing_requests: Positive = 32.0
    """Requests of one replica, running and queued, that the number of replicas aims at."""
    upscale_delay_s: NonNegative = 30.0
    """Seconds that the load has to ask for more replicas before they are added."""
    downscale_delay_s: NonNegative = 600.0
    """Seconds that the load has to ask for fewer replicas before they are removed."""
    upscaling_factor: Positive = 1.0
    """Share of the missing replicas that is added at a time; above 1 adds more than the load asks for."""
    downscaling_factor: Positive = 1.0
    """Share of the needless replicas that is removed at a time."""
    look_back_period_s: Positive = 30.0
    """Seconds over which the load is averaged."""
    metrics_interval_s: Positive = 5.0
    """Seconds between two looks at the load."""

    def __post_init__(self) -> None:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            message = f"exceeds max_replicas {self.max_replicas}; lower it or raise max_replicas"
            _refuse("min_replicas", self.min_replicas, message)


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class DriverSettings:
    """What the driver keeps of the requests in its care."""

    journal: Text | None = None
    """SQLite file of accepted requests and their tokens, so that they outlive the driver; null keeps them in memory."""
    retain_s: NonNegative = 300.0
    """Seconds that the end of a request is kept for a client that lost its connection and asks again."""


@dataclass(frozen=True, kw_only=True, config=STRICT_KEYS)
class Config:
    """All settings of one fleet."""

    model: ModelSettings
    parallel: ParallelSettings = dataclasses.field(default_factory=ParallelSettings)
    engine: EngineSettings = dataclasses.field(default_factory=EngineSettings)
    grpc: GrpcSettings = dataclasses.field(default_factory=GrpcSettings)
    limits: LimitsSettings = dataclasses.field(default_factory=LimitsSettings)
    ray: RaySettings = dataclasses.field(default_factory=RaySettings)
    cluster: ClusterSettings = dataclasses.field(default_factory=ClusterSettings)
    driver: DriverSettings = dataclasses.field(default_factory=DriverSettings)
    autoscaling: AutoscalingSettings = dataclasses.field(default_factory=AutoscalingSettings)
    metrics: MetricsSettings = dataclasses.field(default_factory=MetricsSettings)
    logging: LoggingSettings = dataclasses.field(default_factory=LoggingSettings)
    tracing: TracingSettings = dataclasses.field(default_factory=TracingSettings)
    gateway: GatewaySettings = dataclasses.field(default_factory=GatewaySettings)

    def __post_init__(self) -> None:
        gateway = self.gateway
        if not (gateway.lets_everyone_in or self.grpc.asks_who_calls):
            message = (
                "is reached by other machines and lets everyone in; listen on 127.0.0.1 beside the gateway, "
                "or say gateway.allow_unauthenticated: true on a network that only the gateway reaches"
            )
            _refuse("gateway.listen", gateway.listen, message)
        host = parse_listen(gateway.listen)[0] if gateway.listen else ""
        if gateway.discovery_file and not gateway.advertise_host and host in ("0.0.0.0", "::"):
            message = "is no address that a gateway can connect to; set gateway.advertise_host to one"
            _refuse("gateway.listen", gateway.listen, message)
