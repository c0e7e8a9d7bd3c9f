"""Beam search as transformers does it, for a request as the engine takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardray.runtime.engine.request import SamplingParams
from tests.tiny_models import one_thread


def stop_ids_of(model: Any, params: SamplingParams) -> list[int]:
    eos = [] if params.ignore_eos else model.generation_config.eos_token_id
    return sorted({*params.stop_token_ids, *(eos if isinstance(eos, list) else [eos])})


@one_thread()
@torch.inference_mode()
def beam_search(model: Any, prompt_ids: Sequence[int], params: SamplingParams, **options: Any) -> list[int]:
    """The ids that it generates; those that a decoder behind an encoder is forced to begin with are not among them."""
    ids = torch.tensor([prompt_ids])
    if params.min_tokens:
        options["min_new_tokens"] = params.min_tokens
    if params.repetition_penalty != 1.0:
        options["repetition_penalty"] = params.repetition_penalty
    num_given, num_forced = (1, 0) if model.config.is_encoder_decoder else (len(prompt_ids), 0)
    if model.config.is_encoder_decoder:
        num_forced = len(params.forced_token_ids or ())
        options["forced_bos_token_id"] = params.forced_token_ids[0] if params.forced_token_ids else None
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=params.num_beams,
        length_penalty=params.length_penalty, early_stopping=params.early_stopping,
        max_new_tokens=params.max_tokens + num_forced, eos_token_id=stop_ids_of(model, params) or None, pad_token_id=0,
        **options,
    )  # fmt: skip
    return found[0, num_given + num_forced :].tolist()
