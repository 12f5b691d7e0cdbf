"""The seam by which a policy from outside orders the engine's steps. The engine knows no users and no tiers.

A policy sorts requests into *flows* (say, one an account). It is told every move of a request, says for each step whose
turn it is and for how much, names who yields a slot or blocks, and is told what each step executed.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, Protocol

from workers.api.request import EngineRequest

Flow = Any  # a hashable handle that the policy gives out; only it looks inside


class Charge(NamedTuple):
    """What one step executed for one flow, in tokens. Each position is charged once; the rest is overhead."""

    flow: Flow
    prefill: int = 0
    decode: int = 0
    kv_read: int = 0  # cached tokens that its decodes read
    overhead: int = 0  # recomputed, or discarded


class Turn(NamedTuple):
    """Serve `flow`: its decodes, oldest first, then part-done prefills, then its queue; until that will be charged
    `units` or takes `seconds` of predicted time, whichever comes first.

    `only`: the id of the one request that is meant (None: all of the flow). `urgent`: slots and blocks may be taken
    from any flow but protected requests (see `Ordering.victim`).
    """

    flow: Flow
    units: float
    seconds: float = inf
    only: Hashable = None
    urgent: bool = False


class Rest(NamedTuple):
    """Flows whose turns come next, in this order, whatever each comes to: each until it is charged `units`, and all
    together in `seconds`.
    """

    flows: Sequence[Flow]
    units: float
    seconds: float


class Turns(Protocol):
    """The turns of one step: `next`, then `served` for each, and `close` at the end."""

    admitting: bool  # set it False once nothing more can be admitted: who only waits has no turn then

    def next(self) -> Turn | None:
        """The next turn; None: nobody is left, and the turns are closed."""

    def served(self, units: float, *, more: bool, admissible: bool = False, seconds: float = 0.0) -> None:
        """The turn will be charged `units`, and adds `seconds` to the step. `more`: only its allowance ended it.
        `admissible`: its flow has waiting work that was admitted in it, or could have been.
        """

    def rest(self) -> Rest | None:
        """What is certain of the next turns; None: nothing. Answered by `all_served`, or by nothing: then the turns go
        on as if it had not been asked.
        """

    def all_served(self, served: Iterable[tuple[Flow, float, float]]) -> None:
        """All flows of the `rest` had their turns: (flow, units, seconds); nothing but those allowances ended them."""

    def close(self) -> Any:
        """No more turns. What the step will probably be charged, for `Ordering.executed`."""


class UnitPrices(Protocol):
    """Units of service a token."""

    @property
    def prefill(self) -> float:
        """For a prompt token that is run."""

    @property
    def decode(self) -> float:
        """For a token of the answer."""

    @property
    def kv_read(self) -> float:
        """For a cached token that a decode reads."""


class Ordering(Protocol):
    """Who runs. Called by the thread that steps the engine. `now` is in seconds of the engine's clock."""

    @property
    def prices(self) -> UnitPrices:
        """What a token costs its flow."""

    # moves

    def flow(self, request: EngineRequest) -> Flow:
        """Where the request belongs from now on; it is then told with `arrived`."""

    def arrived(self, flow: Flow, request_id: str, since: float) -> None:
        """A request waits; it first came at `since`."""

    def admitted(self, flow: Flow) -> None:
        """A waiting request has a slot."""

    def evicted(self, flow: Flow) -> None:
        """A resident request lost its slot and waits again."""

    def ended(self, flow: Flow, request_id: str, *, resident: bool) -> None:
        """A request is over; `resident`: it had a slot."""

    # a step

    def undisputed(self, now: float, *, base: float, seconds: float, admitting: bool) -> bool:
        """Whether all decodes may run, in `seconds` of predicted time together, and nobody has to yield to anybody.

        `base`: predicted seconds of a step that runs nothing. `admitting`: slots are free.
        """

    def turns(self, now: float, *, base: float, bounded: bool) -> Turns:
        """The turns of the next step. `base`: predicted seconds of a step that runs nothing.

        Not `bounded`: without a limit on what low flows add to high ones.
        """

    def victim(
        self, needy: Flow, holders: Iterable[Flow], *, admission: bool, urgent: bool, patient: bool
    ) -> Flow | None:
        """Whose youngest sequence yields slot or blocks to `needy`; None: nobody's. `admission`: for a new one, not
        for one that has run. `patient`: nobody of a like rank, since room will be free without that.
        """

    def yielding(
        self, needy: Flow, holders: Iterable[Flow], *, admission: bool, urgent: bool, patient: bool
    ) -> Collection[Flow]:
        """All of `holders` that would be named, one after the other, if nobody else were left."""

    def lowest(self, holders: Iterable[Flow]) -> Flow | None:
        """Who yields when nothing can run otherwise."""

    def protected(self, now: float) -> Iterable[str]:
        """Ids of requests that are never to lose their slot."""

    def expect(self, charges: Iterable[Charge]) -> Any:
        """A planned step will probably be charged so; returns it for `executed`."""

    def executed(self, executed: int, charges: list[Charge], expected: Any) -> None:
        """A step ran `executed` tokens, for these flows; `charges` replace what was `expected` of it."""

    # the cluster

    def report(self, now: float) -> ServiceReport | None:
        """What changed since the last one; None: nothing, or it is too early."""

    def greet(self) -> None:
        """The next report is whole: somebody new reads it."""

    def sync(self, message: ServiceSync) -> None:
        """What the cluster has served is known as of now."""


@dataclass(frozen=True, slots=True)
class Service:
    """One account on one replica since its start, in tokens, and in `units`. `time`: the virtual time at which it
    stands there; `waiting`: its requests there without a slot.
    """

    key: tuple[str, ...]
    prefill: int
    decode: int
    kv_read: int
    units: float
    time: float
    waiting: int


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What a replica executed since its start, in tokens. `accounts` are those that changed since the last report; all
    that were ever charged if it is `whole`.

    executed == overhead + the prefill and decode tokens of all accounts.
    """

    executed: int
    overhead: int
    accounts: tuple[Service, ...]
    whole: bool


@dataclass(frozen=True, slots=True)
class Served:
    """One account in the cluster: its virtual time divided by the replicas, and how many of the receiver's own `units`
    that holds already.
    """

    key: tuple[str, ...]
    time: float
    units: float


@dataclass(frozen=True, slots=True)
class ServiceSync:
    """What the dispatcher knows of service; accounts that changed since the last one to this replica."""

    accounts: tuple[Served, ...]
