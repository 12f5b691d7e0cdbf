"""The waiting rooms of the fleets: first come, first served, or by tiers and quotas, as the QoS configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.dispatch.fleet import Waiting
from router.dispatch.lease import Acquire, Settle
from router.qos.config import Account, QosConfig
from router.qos.fair_queue import Facts, FairQueue
from router.qos.ledger import Prices
from router.qos.members import Place
from router.qos.policy import Limits
from router.qos.queue import Fifo, Ordering, Room, WaitingQueue

_FLOOR_BOUND = 100_000.0  # units, some long leases: what a tier with a floor can be owed at most


class Rooms:
    """Makes rooms, and knows what a request is charged. `qos` holds for all models but those in `own`; `output` tells
    how many tokens a choice will have.
    """

    def __init__(
        self,
        qos: QosConfig | None,
        own: Mapping[str, QosConfig],
        *,
        output: Callable[[Acquire], float],
        clock: Callable[[], float],
        max_waiting: int,
        ordering: Ordering[Waiting] | None = None,
    ) -> None:
        self.qos, self.own = qos, dict(own)
        self._output, self._clock, self._max_waiting = output, clock, max_waiting
        self._ordering: Ordering[Waiting] = ordering or Fifo()
        self._prices = Prices()

    def home(self, request: Acquire) -> tuple[str, str]:
        """Tier and account of `request`; the account is empty where there are no quotas."""
        account = self.account(request.model, request.owner, request.tier)
        return (request.tier, "") if account is None else account.key

    def account(self, model: str, owner: str, tier: str) -> Account | None:
        """Where requests of `owner`, whose key says `tier`, for `model` are charged; None where there are no quotas."""
        qos = self.qos_of(model)
        return qos.account(owner, tier) if qos is not None and qos.enabled else None

    def qos_of(self, model: str) -> QosConfig | None:
        """What orders the requests for `model`; None: first come, first served."""
        return self.own.get(model, self.qos)

    def units(self, request: Acquire, settled: Settle) -> float:
        """What `settled` executed, in units of service."""
        reads = kv_read(request, settled.decode_tokens)
        return self._prices.units(settled.prefill_tokens, settled.decode_tokens, reads)

    def make(self, model: str) -> Room[Waiting]:
        """An empty room for requests for `model`."""
        qos = self.qos_of(model)
        if qos is None or not qos.enabled:
            return WaitingQueue(self._ordering, self._max_waiting, _line, lambda w: (w.request.tier, w.request.owner))
        limits = Limits(step=_FLOOR_BOUND)
        return FairQueue(qos, limits, describe=self._facts, clock=self._clock, limit=self._max_waiting)

    def replaced(self, model: str, room: Room[Waiting], leased: list[Waiting]) -> Room[Waiting]:
        """The `room` of `model`, or a new one with all that waits in it, in the order of its QoS; `leased` hold leases
        already.
        """
        qos = self.qos_of(model)
        if isinstance(room, FairQueue) and qos is not None and qos.enabled:
            room.replace(qos)
            return room
        fresh = self.make(model)
        for w in leased:
            fresh.adopt(w.request.lease_id, w)
        for w in room:
            fresh.push(w.request.lease_id, w)
        return fresh

    def _facts(self, waiting: Waiting) -> Facts:
        """What the order depends on; the work is what is expected of it now."""
        request = waiting.request
        output = round(self._output(request)) * request.choices
        prefill = 0 if request.resumed_tokens else request.prompt_tokens  # a replay's was charged before
        units = self._prices.units(prefill, output, kv_read(request, output))
        return Facts(
            request.owner, request.tier, units, waiting.arrived, request.accepted, request.sub, request.priority
        )


def _line(waiting: Waiting) -> tuple[tuple[str, str], Place]:
    """Whose it is, and where among his."""
    request = waiting.request
    return (request.owner, request.sub), Place(not request.accepted, request.priority, waiting.arrived)


def charge(room: Room[Waiting], request: Acquire, settled: Settle, *, charged: bool) -> None:
    """The lease of `request` is over; what it executed is charged, unless it was `charged` step by step."""
    reads = kv_read(request, settled.decode_tokens)
    room.ended(request.lease_id, settled.prefill_tokens, settled.decode_tokens, reads, charged=charged)


def kv_read(request: Acquire, decodes: int) -> int:
    """Tokens that `decodes` tokens of the answer, over all choices, read: each all before it."""
    each = decodes / request.choices
    return round(decodes * (request.prompt_tokens + request.resumed_tokens / request.choices + each / 2))
