"""Messages about interactive sessions. A session's history stays at the dispatcher; a front has it for one round.

A *session* is what /v1/chat/interactive calls so: a number of its owner's. A *round* is one request in it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Begun(enum.StrEnum):
    """What the wish for a round comes to."""

    BEGUN = "begun"  # run it, and send `EndRound` at the end
    FORGOTTEN = "forgotten"  # as was asked for: no round has begun
    RUNNING = "running"  # another one
    FULL = "full"  # the owner has as many sessions as it may, and all of them run


class Evicted(enum.StrEnum):
    """Why a history is kept no longer; that its client forgot it is no eviction."""

    EXPIRED = "expired"
    COUNT = "count"  # its owner had as many sessions as it may
    MEMORY = "memory"  # all histories together were too large
    SIZE = "size"  # it alone was


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """Histories that are held, rounds under way, bytes held; evictions since the dispatcher's start, by `Evicted`."""

    held: int = 0
    running: int = 0
    bytes: int = 0
    evicted: tuple[tuple[str, int], ...] = tuple((str(reason), 0) for reason in Evicted)


@dataclass(frozen=True, slots=True)
class BeginRound:
    """A round of a session is wanted, or, with `forget`, that there be no such session. Answered by `RoundBegun`.

    An owner has at most `most` sessions; one that is forgotten is for `ttl` seconds.
    """

    number: int
    owner: str
    session: int
    most: int
    ttl: float
    forget: bool = False


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """The verdict on the wish of this number. `revision` grows with each change of the history."""

    number: int
    owner: str
    session: int
    verdict: Begun
    revision: int = 0
    history: bytes = b""


@dataclass(frozen=True, slots=True)
class EndRound:
    """The round that began at `revision` is over. An empty history is left as it was; else it is kept `ttl` seconds."""

    owner: str
    session: int
    revision: int
    history: bytes
    ttl: float


@dataclass(frozen=True, slots=True)
class HoldRound:
    """What a front knows of a session, after its connection was made anew: its history, and the round that runs."""

    owner: str
    session: int
    revision: int
    history: bytes
    ttl: float  # seconds that are left to it
    number: int  # that the round began with; 0: none runs


@dataclass(frozen=True, slots=True)
class CancelRound:
    """The session's round is to end. Answered by `RoundCancelled` once it has."""

    number: int
    owner: str
    session: int


@dataclass(frozen=True, slots=True)
class RoundCancelled:
    """No round runs in the session; whether one did."""

    number: int
    ran: bool


@dataclass(frozen=True, slots=True)
class StopRound:
    """To the front whose round it is, by the number that it began with: end it now."""

    owner: str
    session: int
    number: int
