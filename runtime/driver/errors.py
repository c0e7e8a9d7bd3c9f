"""Why the driver does not take, or cannot finish, a request that is itself in order."""

from __future__ import annotations

from shardray.runtime.driver.caller import public_id


class RequestError(Exception):
    """Base of the errors below; the message is one line for the client."""


class DuplicateRequestError(RequestError):
    """A request with the same id is in flight."""

    def __init__(self, request_id: str) -> None:
        self.request_id = public_id(request_id)
        super().__init__(f"request_id {self.request_id!r} is in flight; choose another or leave it empty")


class UnknownRequestError(RequestError):
    """No request with this id is in flight, and none that ended is retained."""

    def __init__(self, request_id: str) -> None:
        self.request_id = public_id(request_id)
        super().__init__(f"request_id {self.request_id!r} is neither in flight nor retained")


class UnknownModelError(RequestError):
    """The model that is named is not the one that is served."""

    def __init__(self, model_id: str, served_id: str) -> None:
        self.model_id = model_id
        super().__init__(f"model {model_id[:100]!r} is not served here; {served_id} is")


class TakenOverError(RequestError):
    """Another client goes on with this stream."""


class SuspendedError(RequestError):
    """The request is left in the journal, for the next driver to go on with."""


class DeadlineExceededError(RequestError):
    """The request did not end in time."""


class StalledError(RequestError):
    """The client did not take what it was sent."""


class RetryableError(RequestError):
    """The same request may succeed after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(RetryableError):
    """As many requests wait as are allowed to."""


class CallerLimitError(QueueFullError):
    """Its caller has as many requests in flight as its token allows."""


class UnavailableError(RetryableError):
    """No replica takes requests, or the one that ran this request was lost."""

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message, retry_after_s)


class BrokenRequestError(RequestError):
    """The request breaks the step that runs it, also when it runs alone, or has logits that are not numbers; to send it
    again is of no use."""
