"""Which tokens may come next in a text that has to fit a JSON schema, a regular expression, a grammar or a choice.

llguidance parses (https://github.com/guidance-ai/llguidance); here is what it is asked, and when. What may come next is
a function of a request's own tokens, so it is the same after a preemption, a recovery, or in another mesh.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from shardray.runtime.engine.coming import HostCopy
from shardray.runtime.engine.request import Constraint
from shardray.runtime.engine.step import NOT_YET, UNCONSTRAINED
from shardray.runtime.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_NUM_COMPILED = 64  # grammars that are kept
_MOMENT_S = 0.005  # that a step waits for grammars, all together
_ANCHOR = "\x02"  # a character that no token has beside others
_log = logging.getLogger(__name__)

Masks: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]  # a bit for each token
Drafted: TypeAlias = Mapping[int, Sequence[int]]  # by slot
Instead: TypeAlias = Mapping[int, int]  # by row: why it has no token


class Constraints:
    """Those of the requests in a sampler's slots.

    A grammar is compiled beside the steps, which go on without it. ``folder``: of the model, whose tokenizer is read
    for the first request that has a constraint (some 0.4 s for 49,152 tokens), once a process. ``wait`` returns once
    something holds that the device does.
    """

    def __init__(
        self, folder: Path, vocab_size: int, eos_token_ids: Collection[int], device: torch.device,
        wait: Callable[[Callable[[], bool]], None],
    ) -> None:  # fmt: skip
        self._vocabulary = functools.partial(_read_vocabulary, folder, vocab_size, tuple(sorted(eos_token_ids)))
        self._vocab_size = vocab_size
        self._device = device
        self._wait = wait
        self._slots: dict[int, _Constrained] = {}
        self._compiled: dict[Constraint, Future[LLMatcher]] = {}  # the one used last comes last
        self._compiler = ThreadPoolExecutor(1, "constraints")

    def start(self, slot: int, constraint: Constraint, generated_ids: Sequence[int]) -> None:
        """A request takes a slot behind these tokens of its own."""
        compiled = self._compiled.pop(constraint, None) or self._compiler.submit(self._compile, constraint)
        self._compiled[constraint] = compiled
        if len(self._compiled) > _NUM_COMPILED:
            del self._compiled[next(iter(self._compiled))]
        self._slots[slot] = _Constrained(slot, compiled, generated_ids)

    def barred(self, slots: Sequence[int], drafted: Drafted) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Instead]:
        """(n, vocab_size): whether a token may not come next in each slot; and the rows of which it cannot be told.

        A slot with drafted tokens comes once more for each, in a row. Waits for what was drawn last in these slots, and
        for no grammar longer than a moment.
        """
        masks = np.full((len(slots), -(-self._vocab_size // 32)), -1, dtype=np.int32)
        instead, row, until_s = {}, 0, time.monotonic() + _MOMENT_S
        for slot, rows in itertools.groupby(slots):
            own, constrained = masks[row : row + len(list(rows))], self._slots[slot]
            if not constrained.is_compiled(until_s):
                instead[row] = NOT_YET
            elif (told := constrained.fill(own, drafted.get(slot, ()), self._wait)) < len(own):
                own[told] = -1
                instead[row + told] = UNCONSTRAINED
            row += len(own)
        bits = np.unpackbits(~masks.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_), instead

    def drawn(self, rows: Mapping[int, int], tokens: torch.Tensor, drafted: Drafted) -> None:
        """``tokens`` were drawn; ``rows``: by slot, the first one of each that is constrained."""
        copy = HostCopy([tokens], self._device)
        for slot, row in rows.items():
            self._slots[slot].drawn = _Drawn(copy, row, drafted.get(slot, ()))

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        from shardray.runtime.engine.grammar_worker import limits, to_grammar

        return LLMatcher(self._vocabulary(), to_grammar(*constraint), log_level=0, limits=limits())


class _Drawn(NamedTuple):
    """What was drawn last for a request, one token of a batch and one behind each that was drafted."""

    copy: HostCopy
    row: int
    drafted_ids: Sequence[int]

    def taken(self) -> Iterator[int]:
        """Those that the scheduler takes, see ``Sequence.resolve``."""
        token_ids = self.copy.tensors[0][self.row : self.row + len(self.drafted_ids) + 1].tolist()
        for token_id, drafted_id in zip(token_ids, (*self.drafted_ids, None), strict=True):
            yield token_id
            if token_id != drafted_id:
                break


class _Constrained:
    """One request's place in its grammar."""

    def __init__(self, slot: int, compiled: Future[LLMatcher], generated_ids: Sequence[int]) -> None:
        self._slot = slot
        self._compiled = compiled
        self._generated_ids = generated_ids
        self._matcher: LLMatcher | None = None
        self.drawn: _Drawn | None = None  # and not taken yet

    def is_compiled(self, until_s: float) -> bool:
        """Whether its grammar is, or cannot be; most are by the time they are asked for, or in a moment."""
        if self._matcher is not None or self._compiled.done():
            return True
        return not wait_for([self._compiled], max(0.0, until_s - time.monotonic())).not_done

    def fill(self, masks: Masks, drafted_ids: Sequence[int], wait: Callable[[Callable[[], bool]], None]) -> int:
        """Leave a bit for each token that may come next, in a row of its own behind each drafted one.

        Rows behind one that may not come are left alone: what is drawn there is for nobody. Returns the first row of
        which it cannot be told, with a line in the log, or how many there are.
        """
        told = 0
        try:
            matcher = self._at_its_place(wait)
            for told, mask in enumerate(masks):
                if told:
                    drafted_id = drafted_ids[told - 1]
                    if not masks[told - 1, drafted_id // 32] >> (drafted_id % 32) & 1:
                        break
                    matcher = matcher.deep_copy() if told == 1 else matcher
                    matcher.consume_token(drafted_id)
                if not matcher.is_error():
                    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if matcher.is_error():
                    raise ValueError(matcher.get_error())
        except (ValueError, OSError) as error:
            _log.warning("the constraint of slot %d cannot be kept: %s", self._slot, error)
            return told
        return len(masks)

    def _at_its_place(self, wait: Callable[[Callable[[], bool]], None]) -> LLMatcher:
        """Behind all tokens. Behind the one that ends the text nothing is taken: what is drawn there is for nobody."""
        matcher = self._matcher
        if matcher is None:
            matcher = self._matcher = self._compiled.result().deep_copy()
            matcher.consume_tokens(list(self._generated_ids))
        drawn, self.drawn = self.drawn, None
        if drawn is not None:
            if not drawn.copy.is_there:
                wait(drawn.copy.ready)
            for token_id in drawn.taken():
                if token_id >= 0 and not matcher.is_stopped():
                    matcher.consume_token(token_id)
        return matcher


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        """``vocab_size``: the model's, which may have room for more tokens than there are."""
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(token_id for token_id in tokenizer.special_token_ids if token_id < vocab_size)
        known = range(min(vocab_size, tokenizer.vocab_size))
        self.tokens = [tokenizer.piece(token_id) for token_id in known] + [b""] * (vocab_size - len(known))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """As it is written within a text: at its beginning some tokenizers put a blank."""
        ids, written = self._tokenizer.encode(f"{_ANCHOR}{text}", add_special_tokens=False), text.encode()
        for begin in range(1, len(ids)):
            if b"".join(self.tokens[token_id] for token_id in ids[begin:]) == written:
                return ids[begin:]
        return self._tokenizer.encode(text, add_special_tokens=False)


@functools.lru_cache(1)
def _read_vocabulary(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """There has to be an end-of-sequence token. Raises TokenizerError."""
    from llguidance import LLTokenizer

    vocabulary = _Vocabulary(Tokenizer.load(folder, chats=False), vocab_size, eos_token_ids[0])
    return LLTokenizer(vocabulary, vocab_size, list(eos_token_ids))  # type: ignore[arg-type] # a class of its own is asked for
