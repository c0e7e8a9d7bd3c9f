"""What a request is once it is past the front door: token ids, sampling parameters, and the tokens it yields.

Knows nothing of text, gRPC, Ray or torch. The structs travel between processes as MessagePack (never pickle).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from shardray.runtime.engine.traced import TracedStep
from shardray.runtime.model.spec import Pooling

MAX_NUM_BEAMS = 16

ConstraintKind = Literal["json_schema", "regex", "grammar", "choices"]
CONSTRAINT_KINDS: tuple[ConstraintKind, ...] = get_args(ConstraintKind)

# Fields of SamplingParams as they are unset.
_WITH_BEAMS_ONLY: dict[str, object] = {"length_penalty": 1.0, "early_stopping": False}
_NOT_WITH_BEAMS: dict[str, object] = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": None, "stop": (),
    "json_schema": None, "regex": None, "grammar": None, "choices": (),
}  # fmt: skip
_NOT_WITH_CONSTRAINT: dict[str, object] = {"min_tokens": 0, "ignore_eos": False}


class FinishReason(enum.StrEnum):
    """Why a stream ended."""

    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context window
    ABORTED = "aborted"  # cancelled by the client, an operator or a deadline
    ERROR = "error"  # the fleet could not finish it


class FieldError(ValueError):
    """A parameter that cannot be honoured; names the field so that a server can point at it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class Constraint(NamedTuple):
    """What a text has to fit: a JSON schema, a regular expression, a grammar, or one of a JSON array of texts."""

    kind: ConstraintKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen and when to stop.

    ``temperature == 0`` is greedy: top_k, top_p and min_p then have no effect. Processing order is that of
    ``transformers``: logit bias, repetition / presence / frequency penalties, min_tokens, temperature, top_k, top_p,
    min_p; before the temperature, what a constraint rules out is.
    Noise is a function of (seed, position) alone, so a request gives the same text whoever shares its batch.

    ``json_schema``, ``regex``, ``grammar`` and ``choices`` constrain the text, one of them at a time: only tokens that
    lead to a text that fits are chosen, and it ends where it is complete. Cut off by ``max_tokens`` it is not.

    ``num_beams`` above 1 searches for a likely text instead (see ``BeamSearch``), as ``transformers`` does: nothing is
    drawn, the processing is that of log probabilities, and no token is there before the search is over.
    Raises FieldError naming the field that is out of range, or that another one leaves no place for.
    """

    temperature: float = 1.0
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose probability reaches top_p
    min_p: float = 0.0  # drop tokens below min_p times the most likely one
    repetition_penalty: float = 1.0  # over prompt and output; divides positive logits, multiplies negative ones
    presence_penalty: float = 0.0  # over output, subtracted once
    frequency_penalty: float = 0.0  # over output, subtracted per occurrence
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # 64 bits; None: the front door draws one before the engine sees the request
    max_tokens: int = 256
    min_tokens: int = 0  # no end-of-sequence or stop id before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # matched on text where tokens become text, never in the engine
    logprobs: int | None = None  # None: no logprobs; n: the chosen token's and the top n
    json_schema: str | dict[str, Any] | None = None  # of the JSON that the text is to be
    regex: str | None = None  # that the whole text matches; of the Rust crate regex, without look-around
    grammar: str | None = None  # in Lark's notation, or llama.cpp's GBNF
    choices: tuple[str, ...] = ()  # of which the text is one
    num_beams: int = 1  # texts that are followed side by side; 1: no search
    length_penalty: float = 1.0  # a text's score is its log probability over its length to this power
    early_stopping: bool = False  # end once num_beams texts have ended, whether or not a better one could come
    # What the output begins with; not sent back, no part of max_tokens. None: what the model's configuration forces.
    forced_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, 20)
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if any(not text for text in self.stop):
            raise FieldError("stop", "a stop string may not be empty")
        _check_range("num_beams", self.num_beams, 1, MAX_NUM_BEAMS)
        _check_range("length_penalty", self.length_penalty, -10.0, 10.0)
        self._check_beams()
        self._check_constraint()

    def _check_beams(self) -> None:
        if self.num_beams > 1 and self.temperature not in (0.0, 1.0):
            raise FieldError("temperature", f"{self.temperature} is for drawing tokens; leave it unset with num_beams")
        for name, unset in (_WITH_BEAMS_ONLY if self.num_beams == 1 else _NOT_WITH_BEAMS).items():
            if getattr(self, name) == unset:
                continue
            if self.num_beams == 1:
                raise FieldError(name, "is of a beam search; set num_beams above 1 with it")
            hint = "; stop_token_ids can be set" if name == "stop" else ""
            raise FieldError(name, f"has no part in a beam search; leave it unset with num_beams{hint}")

    def _check_constraint(self) -> None:
        given = [kind for kind in CONSTRAINT_KINDS if getattr(self, kind) not in (None, ())]
        if not given:
            return
        if len(given) > 1:
            raise FieldError(given[1], f"cannot stand beside {given[0]}; a text has one constraint")
        if "" in (self.json_schema, self.regex, self.grammar, *self.choices):
            raise FieldError(given[0], "is empty" if given[0] != "choices" else "a choice may not be empty")
        try:
            json.dumps(self.json_schema if isinstance(self.json_schema, dict) else None)
        except (TypeError, ValueError) as error:
            raise FieldError("json_schema", f"is no JSON: {error}") from None
        for name, unset in _NOT_WITH_CONSTRAINT.items():
            if getattr(self, name) != unset:
                raise FieldError(name, f"cannot be kept: {given[0]} says where the text ends; leave it unset with it")

    @property
    def constraint(self) -> Constraint | None:
        """What the text has to fit."""
        if isinstance(self.json_schema, dict):
            return Constraint("json_schema", json.dumps(self.json_schema))
        if self.choices:
            return Constraint("choices", json.dumps(self.choices))
        given: dict[ConstraintKind, str | None]
        given = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return next((Constraint(kind, text) for kind, text in given.items() if text is not None), None)

    @property
    def greedy(self) -> bool:
        """Whether no token is drawn."""
        return self.temperature == 0.0 or self.num_beams > 1

    @property
    def is_plain(self) -> bool:
        """Whether the highest logit is all that matters, once ``min_tokens`` are there."""
        only_best = self.greedy and self.logprobs is None and self.num_beams == 1
        return only_best and not (self.penalizes or self.logit_bias or self.constraint)

    @property
    def penalizes(self) -> bool:
        """Whether the sampler needs the ids seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _check_range(field: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    below = value <= low if open_low else value < low
    if math.isnan(value) or below or value > high:
        raise FieldError(field, f"{value} is outside {'(' if open_low else '['}{low}, {high}]")


@dataclasses.dataclass(frozen=True)
class EncoderInfo:
    """How a model with an encoder takes requests."""

    max_prompt_len: int  # tokens that are read at once
    start_ids: tuple[int, ...] = ()  # what the decoder's tokens begin with
    forced_ids: tuple[int, ...] = ()  # what follows them, unless a request says otherwise
    pooling: Pooling | None = None  # how embeddings are made; None: a decoder follows, and generates


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What a client of an engine has to know of its model."""

    vocab_size: int
    max_model_len: int  # most tokens of prompt and output together; with an encoder, of the output
    eos_token_ids: tuple[int, ...]
    num_kv_tokens: int  # that the cache holds
    encoder: EncoderInfo | None = None
    prefix_block_size: int = 0  # requests share what was computed of their first tokens, in blocks of so many; 0: never
    max_num_seqs: int = MAX_NUM_BEAMS  # requests that run at once, or beams of one

    @property
    def max_request_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return min(self.max_model_len, self.num_kv_tokens)

    @property
    def default_pooling(self) -> Pooling | None:
        """How embeddings are made; None for a model that generates."""
        return None if self.encoder is None else self.encoder.pooling


def given_ids(
    prompt_ids: tuple[int, ...], forced_ids: tuple[int, ...] | None, encoder: EncoderInfo | None
) -> tuple[int, ...]:
    """What stands before the generated tokens in a decoder."""
    if encoder is None:
        return (*prompt_ids, *(forced_ids or ()))
    return (*encoder.start_ids, *(encoder.forced_ids if forced_ids is None else forced_ids))


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the engine takes it. ``generated_ids`` are tokens that an earlier mesh already sent."""

    request_id: str
    prompt_ids: tuple[int, ...]
    generated_ids: tuple[int, ...] = ()
    params: SamplingParams
    priority: int = 0  # lower runs first; first come, first served within one priority
    pooling: Pooling | None = None  # for an embedding of the prompt, instead of tokens
    is_traced: bool = False  # its outputs tell what their steps took
    prefix_scope: str = ""  # what was computed of it is shared with requests of the same scope only

    def given_ids(self, encoder: EncoderInfo | None) -> tuple[int, ...]:
        """What stands before the generated tokens in the decoder."""
        return () if self.pooling else given_ids(self.prompt_ids, self.params.forced_token_ids, encoder)

    def check(self, model: ServedModel) -> None:
        """Raise FieldError if the model cannot run this request."""
        self._check_ids(model.vocab_size)
        if (constraint := self.params.constraint) is not None and not model.eos_token_ids:
            message = "the model has no end-of-sequence token, with which a text that is constrained ends"
            raise FieldError(constraint.kind, message)
        if (self.pooling is None) != (model.default_pooling is None):
            does = (
                "generates text, and gives no embeddings" if self.pooling else "gives embeddings, and generates no text"
            )
            raise FieldError("prompt", f"the model {does}")
        num_prompt, num_given = len(self.prompt_ids), len(self.given_ids(model.encoder))
        if model.encoder is not None and num_prompt > model.encoder.max_prompt_len:
            most = model.encoder.max_prompt_len
            raise FieldError("prompt", f"has {num_prompt} tokens; the encoder reads at most {most} at once")
        if self.pooling is None and num_given + self.params.max_tokens > model.max_model_len:
            raise FieldError(
                "max_tokens",
                f"{'prompt' if model.encoder is None else 'beginning'} of {num_given} tokens + max_tokens "
                f"{self.params.max_tokens} exceeds the context window of {model.max_model_len}; "
                f"at most {max(0, model.max_model_len - num_given)} can be generated",
            )

    def _check_ids(self, vocab_size: int) -> None:
        if not self.prompt_ids:
            raise FieldError("prompt", "has no tokens")
        params = self.params
        for field, token_ids in (
            ("prompt", self.prompt_ids),
            ("logit_bias or stop_token_ids", (*params.logit_bias, *params.stop_token_ids)),
            ("forced_token_ids", params.forced_token_ids or ()),
        ):
            if not all(0 <= token_id < vocab_size for token_id in token_ids):
                raise FieldError(field, f"token ids must lie in [0, {vocab_size})")


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One token of one request, or (``token_id`` None) the end of a stream that yields no further token.

    ``embedding``: float32, little-endian; with the end of a request for one.
    """

    request_id: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    finish_reason: FinishReason | None = None
    error: str | None = None
    embedding: bytes | None = None
    steps: tuple[TracedStep, ...] = ()  # of a traced request: those since its output before
    num_cached_prompt_tokens: int = 0  # with the first token: those of the prompt that others had computed


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of one replica's engine."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_used_pages: int = 0
    num_cached_tokens: int = 0  # tokens whose keys and values are held
    block_size: int = 0
    max_model_len: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # since start
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0  # guessed, and computed beside the others
    num_accepted_tokens: int = 0  # those of them that were right
    num_prefix_queries: int = 0  # tokens of requests that started (again)
    num_prefix_hits: int = 0  # those of them whose keys and values were there
    step_time_s: float = 0.0  # smoothed
    plan_time_s: float = 0.0  # smoothed: scheduler, commit and publish, per step
    expert_imbalance: float = 0.0  # tokens of the busiest expert over the mean, in the leader's layers; 0: no experts

    @property
    def num_full_sequences(self) -> float:
        """Sequences as long as the context window that the pages hold."""
        return self.num_pages * self.block_size / self.max_model_len if self.max_model_len else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens of requests that started whose keys and values were there."""
        return self.num_prefix_hits / self.num_prefix_queries if self.num_prefix_queries else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the tokens that were guessed that was right."""
        return self.num_accepted_tokens / self.num_drafted_tokens if self.num_drafted_tokens else 0.0

    @property
    def kv_waste(self) -> float:
        """Share of the pages in use that holds no token."""
        capacity = self.num_used_pages * self.block_size
        return 1.0 - self.num_cached_tokens / capacity if capacity else 0.0
