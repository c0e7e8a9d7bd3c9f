"""One stream over as many calls as it takes: what both clients do when a connection is lost. Makes no calls itself."""

from __future__ import annotations

import logging
import random
import time
import uuid

import grpc

from shardray.runtime.client.errors import ServerError, to_server_error
from shardray.runtime.client.results import Delta, to_delta
from shardray.v1 import inference_pb2

RESUMABLE_S = 30.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_log = logging.getLogger(__name__)


class ResumingStream:
    """What a stream has seen, and what to ask for next.

    Until the server has accepted the request, one that is full, not ready or not there is asked again for ``wait_s``.
    From then on a lost connection is made anew until ``resumable_s`` have passed without success, and the stream goes
    on from where it was.
    """

    def __init__(
        self,
        address: str,
        request: inference_pb2.GenerateRequest,
        timeout_s: float | None,
        resumable_s: float,
        wait_s: float,
    ) -> None:
        request.resumable_s = resumable_s
        if resumable_s > 0 and not request.request_id:
            request.request_id = f"req-{uuid.uuid4().hex}"
        self.request_id = request.request_id
        self.ended = False  # by its last delta, or by an error that is final
        self._address = address
        self._request = request
        self._timeout_s = timeout_s
        self._resumable_s = resumable_s
        self._wait_s = wait_s
        self._started_s = time.monotonic()
        self._is_accepted = False
        self._num_tokens = 0
        self._num_chars = 0
        self._seed: int | None = None  # until the user was told
        self._failure: ServerError | None = None  # the first one since the last success
        self._failing_since_s = 0.0
        self._num_failures = 0

    @property
    def must_abort(self) -> bool:
        """Whether the server would keep the request, though nobody wants the rest."""
        return self._resumable_s > 0 and not self.ended

    def next_request(self) -> inference_pb2.GenerateRequest:
        if not self._is_accepted:
            return self._request
        seen = inference_pb2.ResumePoint(num_tokens=self._num_tokens, num_chars=self._num_chars)
        return inference_pb2.GenerateRequest(request_id=self.request_id, resume=seen)

    def remaining_s(self) -> float | None:
        """Of the timeout; None: there is none."""
        if self._timeout_s is None:
            return None
        return max(0.0, self._started_s + self._timeout_s - time.monotonic())

    def take(self, response: inference_pb2.GenerateResponse) -> Delta | None:
        """What the user is given; None for a response that only says that the request is accepted."""
        delta = to_delta(response)
        if not self._is_accepted:
            self._is_accepted, self._seed = True, delta.seed
        self._failure, self._num_failures = None, 0
        if not delta.token_ids and not delta.text and delta.finish_reason is None:
            return None
        self._num_tokens += len(delta.token_ids)
        self._num_chars += len(delta.text)
        self.ended = delta.finish_reason is not None
        delta.seed, self._seed = self._seed, None  # with the first delta, as if there were one call
        return delta

    def pause_s(self, error: grpc.RpcError) -> float:
        """A call has failed: how long to wait before the next one. Raises ServerError if there should be none."""
        failure = to_server_error(error, self._address)
        if not self._is_accepted and self._failure is not None and failure.code == "ALREADY_EXISTS":
            self._is_accepted = True  # by a call that was lost before it could say so
            return 0.0
        if self._failure is None:
            self._failure, self._failing_since_s = failure, time.monotonic()
        if not self._may_retry(failure):
            self.ended = True
            raise self._final_error(failure) from None
        self._num_failures += 1
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._num_failures, 10))
        return failure.retry_after_s or random.uniform(0.5, 1.0) * longest_s

    def _may_retry(self, failure: ServerError) -> bool:
        if self.remaining_s() == 0:
            return False
        if not self._is_accepted:
            can_help = failure.code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
            return can_help and time.monotonic() < self._started_s + self._wait_s
        if failure.code != "UNAVAILABLE" or failure.retry_after_s is not None:
            return False  # with an offer to try again from the start, it is the request that ended, not the connection
        if self._num_failures == 0 and self._resumable_s > 0:
            _log.info("lost %s (%s); trying to go on for %g s", self._address, failure, self._resumable_s)
        return time.monotonic() < self._failing_since_s + self._resumable_s

    def _final_error(self, failure: ServerError) -> ServerError:
        lost = self._failure
        if self.remaining_s() == 0 and failure.code != "DEADLINE_EXCEEDED":
            return ServerError("DEADLINE_EXCEEDED", f"the timeout of {self._timeout_s:g} s is over; last: {failure}")
        if not self._is_accepted or lost is None or lost is failure:
            return failure
        if failure.code == "NOT_FOUND":
            return ServerError("UNAVAILABLE", f"{lost}; the server does not know the request any longer")
        if failure.code == "UNAVAILABLE":
            return ServerError("UNAVAILABLE", f"{lost}; tried again for {self._resumable_s:g} s")
        return failure
