"""Whether a constraint can be kept, before a request is taken. Loads no torch: drivers ask."""

from __future__ import annotations

import functools
from pathlib import Path

from shardray.runtime.engine.request import Constraint, FieldError
from shardray.runtime.model.sandbox import Sandbox, SandboxError

_NUM_KNOWN = 256  # constraints that are known to be good
_SANDBOX = Sandbox(Path(__file__).with_name("grammar_worker.py"), "what the text has to fit")


def check_constraint(constraint: Constraint) -> None:
    """Takes milliseconds, and a tenth of a second the first time. Raises FieldError for what cannot be kept."""
    try:
        _check(constraint)
    except SandboxError as error:
        raise FieldError(constraint.kind, " ".join(str(error).split())) from None


@functools.lru_cache(_NUM_KNOWN)
def _check(constraint: Constraint) -> None:
    _SANDBOX.ask(constraint._asdict())
