"""What is served: what the small files of a model say, and the bounds that the settings put on it. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from shardray.runtime.engine.request import EncoderInfo
from shardray.runtime.model.families import read_model_config
from shardray.runtime.model.families.family import Family
from shardray.runtime.model.folder import read_json, read_max_text_len, read_pooling, read_token_ids
from shardray.runtime.model.spec import DecoderSpec, ModelConfigError

if TYPE_CHECKING:
    import torch

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class StepBounds(Protocol):
    """What one step may hold; the engine's settings and a rank's assignment have these fields."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def block_size(self) -> int: ...


@dataclass(frozen=True)
class ServedSpec:
    """A model and the bounds of its steps: all that memory and time depend on, but for the cut."""

    family: Family
    spec: DecoderSpec
    dtype_name: str  # of weights and activations: "bfloat16"
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    encoder: EncoderInfo | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype_name)

    @property
    def item_bytes(self) -> int:
        """Of one element of that dtype."""
        return _ITEM_BYTES[self.dtype_name]

    @property
    def max_prompt_len(self) -> int:
        """Of prompts that an encoder reads, and that have pages of their own."""
        return 0 if self.encoder is None else self.encoder.max_prompt_len


def read_served(folder: Path, dtype: str, max_model_len: int | None, bounds: StepBounds) -> ServedSpec:
    """Raises ModelConfigError for a model or a context window that cannot be served."""
    family, spec = read_model_config(folder)
    return ServedSpec(
        family=family,
        spec=spec,
        dtype_name=read_dtype(dtype, folder),
        max_model_len=_max_model_len(max_model_len, spec),
        max_num_seqs=bounds.max_num_seqs,
        max_num_batched_tokens=bounds.max_num_batched_tokens,
        block_size=bounds.block_size,
        encoder=_encoder_info(folder, spec, bounds),
    )


def torch_dtype(name: str) -> torch.dtype:
    """What ``read_dtype`` names. Not kept instead of the name: a driver reckons with bytes, and imports no torch."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_dtype(name: str, folder: Path) -> str:
    """The dtype to serve in; for ``auto`` what the checkpoint was saved in. Raises ModelConfigError."""
    if name == "auto":
        config = read_json(folder / "config.json")
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in _ITEM_BYTES:
        known = ", ".join(_ITEM_BYTES)
        raise ModelConfigError(f"config.json: dtype {name} is not served; set model.dtype to one of {known}")
    return name


def _max_model_len(wanted: int | None, spec: DecoderSpec) -> int:
    if wanted is not None and wanted > spec.max_positions:
        raise ModelConfigError(
            f"model.max_model_len {wanted} exceeds the model's window of {spec.max_positions} tokens (config.json)"
        )
    return wanted or spec.max_positions


def _encoder_info(folder: Path, spec: DecoderSpec, bounds: StepBounds) -> EncoderInfo | None:
    """A prompt has to fit into one step, beside a step full of decodes."""
    if spec.encoder is None:
        return None
    room = bounds.max_num_batched_tokens - bounds.max_num_seqs
    if not spec.layers:
        most = min(spec.encoder.max_positions, read_max_text_len(folder) or room, room)
        return EncoderInfo(most, pooling=read_pooling(folder))
    start_ids = read_token_ids(folder, "decoder_start_token_id") or read_token_ids(folder, "bos_token_id")
    if not start_ids:
        raise ModelConfigError("config.json: decoder_start_token_id is missing: nothing for the decoder to begin with")
    forced_ids = read_token_ids(folder, "forced_bos_token_id")
    return EncoderInfo(min(spec.encoder.max_positions, room), start_ids, forced_ids)
