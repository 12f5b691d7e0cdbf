"""A policy as simple as one can be, so that the engine is tested without `router.qos`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from workers.api.ordering import Charge, ServiceReport, ServiceSync, Turn
from workers.api.request import EngineRequest


class Flow(NamedTuple):
    """Each request is a flow; they compare by owner, then by arrival."""

    owner: str
    arrival: int
    name: str


class Prices(NamedTuple):
    prefill: float = 1.0
    decode: float = 2.0
    kv_read: float = 0.0


@dataclass
class InOrder:
    """All flows, least first, each as much as it wants."""

    flows: Iterator[Flow]
    admitting: bool = True

    def next(self) -> Turn | None:
        flow = next(self.flows, None)
        return None if flow is None else Turn(flow, inf)

    def served(self, units: float, *, more: bool, admissible: bool = False, seconds: float = 0.0) -> None:
        assert not more

    def rest(self) -> None:
        return None

    def close(self) -> str:
        return "expected"


@dataclass
class ByOwner:
    """The least owner first; who is greater yields. Keeps all charges by request. `quick`: does not insist on turns."""

    quick: bool = False
    yields: bool = True
    live: dict[Flow, str] = field(default_factory=dict)  # -> "waits" or "runs"
    charges: dict[str, list[int]] = field(default_factory=dict)
    executed_tokens: int = 0
    prices: Prices = Prices()

    def flow(self, request: EngineRequest) -> Flow:
        return Flow(request.owner, len(self.charges), request.id)

    def arrived(self, flow: Flow, request_id: str, since: float) -> None:
        assert flow.name == request_id
        self.live[flow] = "waits"
        self.charges[request_id] = [0, 0, 0, 0]

    def _move(self, flow: Flow, before: str, after: str) -> None:
        assert self.live[flow] == before
        self.live[flow] = after

    def admitted(self, flow: Flow) -> None:
        self._move(flow, "waits", "runs")

    def evicted(self, flow: Flow) -> None:
        self._move(flow, "runs", "waits")

    def ended(self, flow: Flow, request_id: str, *, resident: bool) -> None:
        assert self.live.pop(flow) == ("runs" if resident else "waits")

    def undisputed(self, now: float, *, base: float, seconds: float, admitting: bool) -> bool:
        return self.quick and set(self.live.values()) == {"runs"}

    def turns(self, now: float, *, base: float, bounded: bool) -> InOrder:
        return InOrder(iter(sorted(self.live)))

    def victim(
        self, needy: Flow, holders: Iterable[Flow], *, admission: bool, urgent: bool, patient: bool
    ) -> Flow | None:
        last = max(holders, default=needy)
        worse = last > needy if not (admission or patient) else last.owner > needy.owner
        return last if worse and self.yields else None

    def yielding(
        self, needy: Flow, holders: Iterable[Flow], *, admission: bool, urgent: bool, patient: bool
    ) -> list[Flow]:
        how = {"admission": admission, "urgent": urgent, "patient": patient}
        return [h for h in holders if self.victim(needy, [h], **how) is not None]

    def lowest(self, holders: Iterable[Flow]) -> Flow | None:
        return max(holders, default=None)

    def protected(self, now: float) -> Iterable[str]:
        return ()

    def expect(self, charges: Iterable[Charge]) -> str:
        assert {c.flow for c in charges} <= set(self.live)
        return "expected"

    def executed(self, executed: int, charges: list[Charge], expected: str | None) -> None:
        assert expected in ("expected", None)
        assert executed == sum(c.prefill + c.decode + c.overhead for c in charges)
        self.executed_tokens += executed
        for flow, *counts in charges:
            sums = self.charges[flow.name]
            for i, count in enumerate(counts):
                sums[i] += count

    def of(self, name: str) -> tuple[int, int, int, int]:
        """Tokens of one request: prefill, decode, KV read, overhead."""
        prefill, decode, kv_read, overhead = self.charges[name]
        return prefill, decode, kv_read, overhead

    def report(self, now: float) -> ServiceReport | None:
        return None

    def greet(self) -> None:
        pass

    def sync(self, message: ServiceSync) -> None:
        raise NotImplementedError
