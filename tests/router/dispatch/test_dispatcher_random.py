"""Any order of operations keeps the dispatcher's promises."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from router.dispatch.dispatcher import DispatcherConfig, Reply
from router.dispatch.lease import Acquire, Granted, HeldLease, LeaseLost, Outcome, Refused, Reregister
from router.dispatch.strategies import STRATEGIES
from workers.api.replica import LoadReport

from .virtual import Clock, ask, done, info, made

REPLICAS = ("a", "b", "c")
CLIENTS = ("i", "j")
MODELS = ("m", "n")


class Promises(RuleBasedStateMachine):
    """The test's own books, kept from replies alone, against the dispatcher's."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.number = 0
        self.held: dict[str, tuple[Acquire, str, str]] = {}  # id -> request, client, replica
        self.waiting: dict[str, tuple[Acquire, str, float]] = {}  # id -> request, client, arrival
        self.ended: set[str] = set()
        self.up: dict[str, int] = {}  # replica -> slots
        self.generation = 0

    @initialize(strategy=st.sampled_from(sorted(STRATEGIES)), seed=st.integers(0, 9))
    def start(self, strategy: str, seed: int) -> None:
        config = DispatcherConfig(strategy=strategy, recovery=0.0, max_waiting=6, models=MODELS, orphan_grace=1.0)
        self.dispatcher, self.clock = made(config, seed=seed)

    def end(self, lease_id: str) -> None:
        assert lease_id not in self.ended, "ended twice"
        self.ended.add(lease_id)

    def grant(self, granted: Granted) -> None:
        request, client, arrived = self.waiting.pop(granted.lease_id)
        assert granted.replica.id in self.up
        assert granted.replica.model == request.model
        others = {r.info.id for r in self.dispatcher.rows() if r.info.model == request.model} - set(request.excluded)
        assert granted.replica.id not in request.excluded or not others
        used = sum(r.choices for r, _, at in self.held.values() if at == granted.replica.id)
        assert used + request.choices <= self.up[granted.replica.id], "over capacity"
        for other, _, at in self.waiting.values():  # FIFO among equals
            if (other.model, other.excluded) == (request.model, request.excluded):
                assert arrived <= at
        self.held[granted.lease_id] = (request, client, granted.replica.id)

    def take(self, replies: list[Reply]) -> None:
        for reply in replies:
            message = reply.message
            if isinstance(message, Granted):
                assert self.waiting[message.lease_id][1] == reply.client
                self.grant(message)
            elif isinstance(message, Refused):
                del self.waiting[message.lease_id]
                self.end(message.lease_id)
            else:
                assert isinstance(message, LeaseLost)
                _, client, replica = self.held.pop(message.lease_id)
                assert (client, replica) == (reply.client, message.replica_id)
                self.end(message.lease_id)

    @rule(
        client=st.sampled_from(CLIENTS),
        model=st.sampled_from(MODELS),
        prompt=st.integers(1, 200),
        choices=st.integers(1, 3),
        excluded=st.sets(st.sampled_from(REPLICAS), max_size=1),
        accepted=st.booleans(),
    )
    def acquire(self, client: str, model: str, prompt: int, choices: int, excluded: set[str], accepted: bool) -> None:
        self.number += 1
        names = tuple(r for r in self.up if r[0] in excluded)
        request = ask(f"l{self.number}", prompt=prompt, model=model, choices=choices, excluded=names, accepted=accepted)
        answer = self.dispatcher.acquire(client, request)
        if isinstance(answer, Refused):
            self.end(request.lease_id)
            return
        self.waiting[request.lease_id] = (request, client, self.clock.now)
        if answer is not None:
            self.grant(answer)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), outcome=st.sampled_from(list(Outcome)))
    def settle(self, data: st.DataObject, outcome: Outcome) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[lease_id]
        self.end(lease_id)
        self.take(self.dispatcher.settle(done(lease_id, outcome=outcome)))

    @precondition(lambda self: self.held or self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted({*self.held, *self.waiting})))
        self.held.pop(lease_id, None)
        self.waiting.pop(lease_id, None)
        self.end(lease_id)
        self.take(self.dispatcher.cancel(lease_id))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def late(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.ended)))
        assert self.dispatcher.settle(done(lease_id)) == []
        assert self.dispatcher.cancel(lease_id) == []

    @rule(name=st.sampled_from(REPLICAS), model=st.sampled_from(MODELS), slots=st.integers(1, 4))
    def replica_up(self, name: str, model: str, slots: int) -> None:
        self.generation += 1
        replica_id = f"{name}{self.generation}"
        self.up[replica_id] = slots
        self.take(self.dispatcher.replica_up(info(replica_id, model, slots=slots, blocks=20)))

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def replica_down(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.up)))
        del self.up[replica_id]
        expected = sorted(i for i, (_, _, at) in self.held.items() if at == replica_id)
        replies = self.dispatcher.replica_down(replica_id)
        assert sorted(r.message.lease_id for r in replies) == expected
        self.take(replies)
        assert self.dispatcher.replica_down(replica_id) == []

    @precondition(lambda self: self.up)
    @rule(data=st.data(), running=st.integers(0, 4), seconds=st.floats(0.001, 1.0), free=st.integers(0, 20))
    def load(self, data: st.DataObject, running: int, seconds: float, free: int) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.up)))
        self.number += 1
        report = LoadReport(
            self.number, seconds, prefill_tokens=self.number % 3 * 50, decode_tokens=running, running=running,
            kv_tokens=running * 40, free_blocks=free, total_blocks=20,
        )  # fmt: skip
        self.take(self.dispatcher.load(replica_id, report))

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(sorted(self.up)))
        self.dispatcher.drain(replica_id)
        self.up[replica_id] = 0  # nothing may be granted there any more

    @rule(seconds=st.floats(0.0, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.take(self.dispatcher.tick())

    @rule(client=st.sampled_from(CLIENTS), data=st.data())
    def ingress_returns(self, client: str, data: st.DataObject) -> None:
        """The connection broke; some settlements and cancellations were lost with it."""
        for lease_id in [i for i, (_, c, _) in self.waiting.items() if c == client]:
            self.dispatcher_forgets(lease_id)
        self.take(self.dispatcher.client_gone(client))
        mine = sorted(i for i, (_, c, _) in self.held.items() if c == client)
        kept = data.draw(st.sets(st.sampled_from(mine))) if mine else set()
        for lease_id in set(mine) - kept:
            del self.held[lease_id]
            self.end(lease_id)
        held = tuple(HeldLease(replace(self.held[i][0], age=1.0), self.held[i][2]) for i in sorted(kept))
        self.take(self.dispatcher.reregister(client, Reregister(held=held)))

    def dispatcher_forgets(self, lease_id: str) -> None:
        del self.waiting[lease_id]
        self.end(lease_id)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "dispatcher"):
            return
        ledger = self.dispatcher.ledger()
        assert ledger.balanced, ledger
        assert (ledger.held, ledger.waiting) == (len(self.held), len(self.waiting))
        assert ledger.settled + ledger.cancelled + ledger.lost + ledger.refused == len(self.ended)
        for row in self.dispatcher.rows():
            assert row.slots == sum(r.choices for r, _, at in self.held.values() if at == row.info.id)


TestPromises = Promises.TestCase
TestPromises.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
