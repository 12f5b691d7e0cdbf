"""The seam between HTTP and the cluster: what the front asks for, and what comes back, in tokens.

`router.http` turns text into a `GenerationRequest` and events back into text; `router.sessions` is the real
`Generator`, and tests use fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from router.dispatch.lease import Granted, LeaseLost
from workers.api.grammar import GrammarSpec
from workers.api.request import BeamParams, Delta, SamplingParams


@dataclass(slots=True)
class Trace:
    """What became of one generation request; the generator writes it, logs and metrics read it."""

    queue_seconds: float = 0.0  # without a lease, over all attempts
    replica: str = ""  # that had it last
    replays: int = 0
    expected_first: float = 0.0  # seconds from the last grant to the first token, as predicted; 0: no grant yet
    first_seconds: float = 0.0  # and as it was; 0: none came


@dataclass(slots=True)
class Handover:
    """A lease that somebody else asked for. Who takes the request over hears of its loss by `on_lost`."""

    lease_id: str
    granted: Granted | None = None
    on_lost: Callable[[LeaseLost], None] = lambda loss: None

    def tell(self, loss: LeaseLost) -> None:
        """The lease is lost."""
        self.on_lost(loss)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt with n choices: one lease, n sequences.

    `samplings[i].choice == i`, and the seed is already drawn. `owner` and `tier` come from the API key, never from a
    body.
    """

    id: str
    model: str
    prompt_ids: tuple[int, ...]
    samplings: tuple[SamplingParams, ...]
    owner: str = "default"
    tier: str = ""
    sub: str = ""  # which of the owner's own users asks, as the body says
    priority: int = 0  # among what its owner, and sub-user, asks for: the least goes first
    route: str = ""  # learned output lengths are per (owner, route)
    salt: bytes = b""
    adapter: str | None = None
    grammar: GrammarSpec | None = None  # of every choice
    beams: BeamParams | None = None  # the choices are its answers, the best first, in place of draws
    handover: Handover | None = None  # of the first lease; None: there is none yet
    trace: Trace = field(default_factory=Trace, compare=False)


class ChoiceDelta(NamedTuple):  # one a token: a frozen dataclass takes three times as long to make
    """A delta of choice number `choice`. Positions are gapless and come once, whatever replicas died."""

    choice: int
    delta: Delta


Batch = tuple[ChoiceDelta, ...]
Sink = Callable[[Batch], bool]


class Generator(Protocol):
    """Runs generation requests."""

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        """Hand `sink` the deltas, one batch an engine step, until every choice has its `finish`.

        The first batch may be empty and then only says that the request is accepted. Before it this may raise
        Overloaded, NoReplica, ModelNotFound or InvalidRequest, after it EngineFault or ReplicaLost when replay gave up.

        `sink` is called in the event loop, for all streams of a step in a row: it does not block, and who reads slowly
        keeps the rest for himself. It says whether more is wanted; if not, or when it raises, or when this call is
        cancelled, the sequences are aborted. What it raises rises here.
        """
