"""The one tree of errors.

    EchelonError
    ├── RequestError             the client's fault; the request alone fails
    │   ├── InvalidRequest           a value is wrong
    │   │   └── ContextLengthExceeded
    │   ├── ModelNotFound
    │   └── NotAuthorized
    ├── Overloaded               try again later; `retry_after` says when
    │   └── NoReplica                no replica of the model is ready
    ├── ReplicaLost              the replica died or was cut off; its requests are replayed
    ├── NodeFailed               a foreign server cannot be reached, or broke off
    ├── EngineFault              a step failed; the request ends with a declared error
    │   └── OutOfMemory
    ├── WireError                a peer sent what is not a frame of ours
    ├── ConfigError              a config is refused before anything starts
    └── WeightError              a checkpoint does not fit the model; names file and tensor

`router.http` holds the one table from these to HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMED_MODELS = 16  # in an error


class EchelonError(Exception):
    """The root of all errors that Echelon raises on purpose. `str(error)` says what to do.

    A pickled error comes back as it was, whatever its constructor takes: Ray carries errors between our processes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args), self.__dict__


class RequestError(EchelonError):
    """The client's fault. `param` names the field (OpenAI's spelling), `code` is machine-readable."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequest(RequestError):
    """A value of the request is wrong."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFound(RequestError):
    """No such model here. `there`: names of those that the caller may use."""

    def __init__(self, model: str, there: Sequence[str] = ()) -> None:
        named = ", ".join([*there[:NAMED_MODELS], *["..."] * (len(there) > NAMED_MODELS)])
        known = f" There are: {named}." if named else ""
        super().__init__(
            f"The model '{model[:64]}' does not exist or you do not have access to it.{known}",
            param="model",
            code="model_not_found",
        )


class NotAuthorized(RequestError):
    """No key, a wrong key, or a key without the right."""


class Overloaded(EchelonError):
    """Refused for now. `retry_after` is in seconds.

    Where a queue was full, `position` says where the request would have stood (0: not known), and `wait` how many
    seconds it would have waited: at least, probably, at most.
    """

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.position = 0
        self.wait = (0.0, 0.0, 0.0)


class NoReplica(Overloaded):
    """No replica of the model is ready."""


class ReplicaLost(EchelonError):
    """The replica died, or the connection to it did."""


class NodeFailed(EchelonError):
    """A foreign server failed. `answered`: a part of its answer had come, so nobody else is asked."""

    def __init__(self, message: str, *, answered: bool = False) -> None:
        super().__init__(message)
        self.answered = answered


class EngineFault(EchelonError):
    """A step failed; the message names the rank and the cause."""


class OutOfMemory(EngineFault):
    """The device has too little memory; the message says what would fit."""


class WireError(EchelonError):
    """A peer sent what is not a frame of ours, or the wrong secret."""


class ConfigError(EchelonError):
    """A config is refused before anything starts."""


class WeightError(EchelonError):
    """A checkpoint does not fit the model."""


def _restored(kind: type[EchelonError], args: tuple[Any, ...]) -> EchelonError:
    return kind.__new__(kind, *args)  # not through __init__: it would word the message again
