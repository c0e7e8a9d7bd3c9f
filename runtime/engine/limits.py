"""What a scheduler may use, and which requests fit into that."""

from __future__ import annotations

from dataclasses import dataclass

from shardray.runtime.engine.request import EncoderInfo, EngineRequest, FieldError

_STEP_UNIT = 16  # tokens
_MOST_READERS_PER_STREAM = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What the scheduler may use. Raises FieldError naming the field that is out of range."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_beside_decodes: int | None = None  # see prefill_budget; None: as many as fit
    max_model_len: int
    block_size: int
    num_pages: int
    max_in_flight: int = 1  # plans made and not yet committed: one, two to overlap planning with running, one a stage
    lookahead: int = 0  # unresolved tokens a sequence may have when it is planned: 0, or 1 with a single stage
    max_draft_tokens: int = 0  # of a sequence in a plan; 0: nothing is drafted
    max_drafting_step: int = 16  # tokens of a plan with drafted ones
    prefix_caching: bool = True  # whether requests that begin alike share pages
    eos_token_ids: frozenset[int] = frozenset()
    encoder: EncoderInfo | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "block_size", "num_pages", "max_in_flight"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"{getattr(self, name)} must be at least 1")
        if self.max_prefill_beside_decodes is not None and self.max_prefill_beside_decodes < 1:
            raise FieldError("max_prefill_beside_decodes", f"{self.max_prefill_beside_decodes} must be at least 1")
        if self.lookahead not in (0, 1):
            raise FieldError("lookahead", f"{self.lookahead} must be 0 or 1")
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise FieldError(
                "max_num_batched_tokens",
                f"{self.max_num_batched_tokens} must exceed max_num_seqs ({self.max_num_seqs}), "
                "so that a step full of decodes has room for a prefill",
            )

    @property
    def num_lanes(self) -> int:
        """Plans among which the running sequences are divided. With lookahead every sequence can be in every plan."""
        return 1 if self.lookahead else self.max_in_flight

    @property
    def prefix_block_size(self) -> int:
        """See ServedModel. What a decoder makes of its tokens depends on what it attends to of an encoder's prompt."""
        return self.block_size if self.prefix_caching and self.encoder is None else 0

    def prefill_budget(self, num_decodes: int, readers_per_stream: float = 1.0) -> int:
        """Tokens of prompts in a plan beside its decodes: what they leave of a lane's share, and never none.

        Not more than would make the decodes wait long, if there are any: ``max_prefill_beside_decodes``, or up to four
        times as much where that many more requests wait to be read than streams wait for the step. Such steps mostly
        have a multiple of 16 tokens in all, so that few kinds of them are recorded.
        """
        budget = max(1, -(-self.max_num_batched_tokens // self.num_lanes) - num_decodes)
        if num_decodes == 0 or self.max_prefill_beside_decodes is None:
            return budget
        factor = min(max(1.0, readers_per_stream), _MOST_READERS_PER_STREAM)
        most = int(self.max_prefill_beside_decodes * factor)
        over = (num_decodes + most) % _STEP_UNIT
        return min(budget, most - over if most > over else most)

    def given_ids(self, request: EngineRequest) -> tuple[int, ...]:
        """What stands before the generated tokens."""
        return request.given_ids(self.encoder)

    def max_len(self, request: EngineRequest) -> int:
        """Tokens, those that are given included, at which a request ends for its length."""
        if request.pooling is not None:
            return 0
        return min(len(self.given_ids(request)) + request.params.max_tokens, self.max_model_len)

    def check(self, request: EngineRequest) -> None:
        """Raise FieldError if a request could not run even alone. Safe to call from any thread."""
        given_len, capacity = len(self.given_ids(request)), self.num_pages * self.block_size
        if not request.prompt_ids:
            raise FieldError("prompt", "has no tokens")
        num_beams = request.params.num_beams
        if num_beams > self.max_num_seqs:
            raise FieldError("num_beams", f"{num_beams} exceeds the {self.max_num_seqs} of engine.max_num_seqs")
        if given_len >= self.max_model_len:
            raise FieldError("prompt", f"{given_len} tokens leave no room in a context window of {self.max_model_len}")
        prompt_room = 0
        if self.encoder is not None and request.pooling is None:
            prompt_room = -(-len(request.prompt_ids) // self.block_size) * self.block_size
        # What beams share of what is given is there once.
        apart = self.max_len(request) - given_len // self.block_size * self.block_size
        of_others = (num_beams - 1) * -(-apart // self.block_size) * self.block_size
        if num_beams > 1 and prompt_room + self.max_len(request) + of_others > capacity:
            raise FieldError(
                "num_beams",
                f"prompt of {len(request.prompt_ids)} tokens + {num_beams} times max_tokens "
                f"{request.params.max_tokens} exceeds the {capacity} tokens that the KV cache holds "
                f"({self.num_pages} pages of {self.block_size})",
            )
        if prompt_room + self.max_len(request) > capacity:
            raise FieldError(
                "max_tokens",
                f"prompt of {len(request.prompt_ids)} tokens + max_tokens {request.params.max_tokens} exceeds the "
                f"{capacity} tokens that the KV cache holds ({self.num_pages} pages of {self.block_size})",
            )
