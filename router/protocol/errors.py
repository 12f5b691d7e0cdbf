"""Errors as OpenAI's clients know them, and the one table from `workers.api.errors` to HTTP.

error                    status  type                    code
InvalidRequest           400     invalid_request_error   the error's own
NotAuthorized            401     invalid_request_error   the error's own
ModelNotFound            404     invalid_request_error   model_not_found
HttpRefusal              its own: 403, 404, 405, 408, 413, 414, 415, 431
Overloaded               429     rate_limit_error        rate_limit_exceeded     + Retry-After, and where a queue
                                 was full x-queue-position, x-queue-wait-seconds: at least, probably, at most
NoReplica                503     service_unavailable_error  no_replica           + Retry-After
ReplicaLost              503     service_unavailable_error  replica_lost         + Retry-After
EngineFault and others   500     server_error            engine_fault, internal_error
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

from workers.api.errors import (
    EchelonError,
    EngineFault,
    InvalidRequest,
    NodeFailed,
    NoReplica,
    NotAuthorized,
    Overloaded,
    ReplicaLost,
    RequestError,
)

ECHO_CHARACTERS = 64  # of input shown in a message


class HttpRefusal(RequestError):
    """Refused by the rules of HTTP rather than by a value; `status` and `headers` go out as they are."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """What goes out for one error."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The JSON body, UTF-8."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}, ensure_ascii=True).encode()


# First match wins; subclasses stand before their bases.
_TABLE: tuple[tuple[type[EchelonError], int, str, str | None], ...] = (
    (NotAuthorized, 401, "invalid_request_error", None),
    (InvalidRequest, 400, "invalid_request_error", None),
    (RequestError, 404, "invalid_request_error", None),
    (NoReplica, 503, "service_unavailable_error", "no_replica"),
    (Overloaded, 429, "rate_limit_error", "rate_limit_exceeded"),
    (ReplicaLost, 503, "service_unavailable_error", "replica_lost"),
    (NodeFailed, 502, "server_error", "node_failed"),
    (EngineFault, 500, "server_error", "engine_fault"),
    (EchelonError, 500, "server_error", "internal_error"),
)


def answer_for(error: BaseException) -> ErrorAnswer:
    """The answer to `error`. What is no `EchelonError` shows nothing of itself."""
    if isinstance(error, HttpRefusal):
        return ErrorAnswer(
            error.status, "invalid_request_error", error.message, error.param, error.code, dict(error.headers)
        )
    for kind, status, name, code in _TABLE:
        if isinstance(error, kind):
            headers = {}
            if isinstance(error, Overloaded):
                headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
                if error.position:
                    headers["x-queue-position"] = str(error.position)
                    headers["x-queue-wait-seconds"] = " ".join(f"{seconds:.1f}" for seconds in error.wait)
            elif status == 503:
                headers["retry-after"] = "1"
            elif status == 401:
                headers["www-authenticate"] = "Bearer"
            if isinstance(error, RequestError):
                return ErrorAnswer(status, name, error.message, error.param, error.code or code, headers)
            return ErrorAnswer(status, name, str(error) or "The server failed.", None, code, headers)
    return ErrorAnswer(500, "server_error", "The server had an error while processing your request.", None, None)


def code_of(error: BaseException) -> str:
    """One word for `error`, for logs and metrics."""
    answer = answer_for(error)
    return answer.code or answer.type


def is_refusal(error: BaseException) -> bool:
    """Whether the request was not taken: it is at fault, or there is no room for it now."""
    return isinstance(error, RequestError | Overloaded)


def echo(value: object) -> str:
    """A piece of the client's input, short and printable, for a message."""
    text = str(value)
    shown = text if len(text) <= ECHO_CHARACTERS else text[: ECHO_CHARACTERS - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in shown)
