"""How a request ended, in a form that can be kept: enough to end its stream once more in the same way."""

from __future__ import annotations

import msgspec

from shardray.runtime.driver.errors import BrokenRequestError, DeadlineExceededError, UnavailableError
from shardray.runtime.engine.request import FieldError, FinishReason

_RETRY_AFTER_S = 2.0


class RequestEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """With neither ``reason`` nor ``error`` its tokens ended it: a stop string is complete in their text."""

    reason: FinishReason | None = None  # what the engine or the driver said
    with_token: bool = False  # the reason came with the last token, not after it
    error: str = ""  # the class of the error that ended it
    message: str = ""
    field: str = ""  # of a FieldError

    @classmethod
    def from_error(cls, error: Exception) -> RequestEnd:
        if isinstance(error, FieldError):
            return cls(error="FieldError", message=error.message, field=error.field)
        return cls(error=type(error).__name__, message=str(error))

    def as_error(self) -> Exception | None:
        """What iterating the stream raised; None if it had a proper end."""
        match self.error:
            case "":
                return None
            case "FieldError":
                return FieldError(self.field, self.message)
            case "DeadlineExceededError":
                return DeadlineExceededError(self.message)
            case "BrokenRequestError":
                return BrokenRequestError(self.message)
        return UnavailableError(self.message, _RETRY_AFTER_S)
