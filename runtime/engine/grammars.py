"""Whether a constraint can be kept, before a request is taken. Loads no torch: drivers ask."""

from __future__ import annotations

import threading
from pathlib import Path

from shardray.runtime.engine.request import Constraint, FieldError
from shardray.runtime.model.sandbox import Sandbox, SandboxError

_MAX_KNOWN = 256
_MAX_PROCESSOR_S = 1.0  # hosts will spend as much
_SANDBOX = Sandbox(
    Path(__file__).with_name("grammar_worker.py"), "what the text has to fit", max_processor_s=_MAX_PROCESSOR_S
)
_known: dict[Constraint, None] = {}  # to be good, the latest last
_lock = threading.Lock()


def is_known(constraint: Constraint) -> bool:
    """Whether it was checked lately, and can be kept."""
    return constraint in _known


def check_constraint(constraint: Constraint) -> None:
    """Takes milliseconds, and a tenth of a second the first time. Raises FieldError for what cannot be kept."""
    if is_known(constraint):
        return
    try:
        _SANDBOX.ask(constraint._asdict())
    except SandboxError as error:
        raise FieldError(constraint.kind, " ".join(str(error).split())) from None
    with _lock:
        _known[constraint] = None
        if len(_known) > _MAX_KNOWN:
            del _known[next(iter(_known))]
