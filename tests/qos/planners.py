"""Who runs in a step of the fake engine: by `router.qos`, or first come, first served to compare with."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from math import inf

from router.qos.config import Account, QosConfig, Tier
from router.qos.ledger import Prices
from router.qos.policy import Limits, Policy
from router.qos.standing import Standing
from router.qos.turns import Oldest, Turns
from workers.api.ordering import Charge, Turn

from .engine import Engine, Job


def tiers(*quotas: dict[str, float], **settings: object) -> QosConfig:
    """Tiers T0, T1, ... of these users; `T1={"min_share": 0.02}` sets limits."""
    made = tuple(Tier(i, f"T{i}", **settings.get(f"T{i}", {})) for i in range(len(quotas)))  # type: ignore[arg-type]
    accounts = tuple(Account(t, u, q) for t, users in zip(made, quotas, strict=True) for u, q in users.items())
    return QosConfig(made, accounts)


class QosPlanner:
    """Fills a step turn by turn."""

    def __init__(
        self,
        config: QosConfig,
        *,
        budget: int = 2048,
        pool: int = 60_000,
        longest: int = 0,
        tau: float = 0.020,
        pacing: float | None = None,
        eviction: float | None = None,
        prices: Prices | None = None,
        policy: type[Policy] = Policy,
        turns: type[Turns] = Turns,
    ) -> None:
        prices = prices or Prices()
        self.limits = Limits(prices.most_a_step(budget, pool), longest, pacing, eviction, tau=tau)
        self.policy = policy(config, self.limits, prices)
        self._turns = turns
        self.waiting: dict[Standing, deque[Job]] = defaultdict(deque)
        self.running: dict[Standing, list[Job]] = defaultdict(list)
        self.of_tier: dict[str, list[tuple[float, int, Job]]] = defaultdict(list)
        self._plan: dict[Job, int] = {}
        self._provisional: dict[Standing, float] = {}

    def standing(self, job: Job) -> Standing:
        return self.policy.standing(self.policy.config.account(job.user))

    # Planner

    def arrived(self, job: Job) -> None:
        standing = self.standing(job)
        self.waiting[standing].append(job)
        self.policy.queued(standing)
        insort(self.of_tier[standing.account.tier.name], (job.arrived, job.name, job))

    def ended(self, job: Job) -> None:
        standing = self.standing(job)
        self.running[standing].remove(job)
        self.policy.ended(standing)
        self.of_tier[standing.account.tier.name].remove((job.arrived, job.name, job))

    def withdrawn(self, job: Job) -> None:
        standing = self.standing(job)
        self.waiting[standing].remove(job)
        self.policy.withdrawn(standing)
        self.of_tier[standing.account.tier.name].remove((job.arrived, job.name, job))

    def executed(self, engine: Engine, ran: list[tuple[Job, int, int, int, int]]) -> None:
        charges = [Charge(self.standing(job), *rest) for job, *rest in ran]
        self.policy.commit(sum(c.prefill + c.decode + c.overhead for c in charges), charges, self._provisional)

    def plan(self, engine: Engine, now: float) -> dict[Job, int]:
        while True:
            self._plan = {}
            turns = self._turns(self.policy, now, self._oldest())
            self._left = engine.budget
            self._stuck = False
            while self._left > 0 and (turn := turns.next()) is not None:
                self._serve(engine, turn, turns, now)
            self._provisional = turns.close()
            if self._plan or not engine.residents:
                return self._plan
            for standing, units in self._provisional.items():
                self.policy.expect(standing, -units)
            lowest = self.policy.lowest(s for s, jobs in self.running.items() if jobs)
            assert lowest is not None
            self._evict(engine, self.running[lowest][-1])

    # inside

    def _oldest(self) -> dict[str, Oldest]:
        firsts = {name: jobs[0] for name, jobs in self.of_tier.items() if jobs}
        return {name: Oldest(self.standing(job), since, job) for name, (since, _, job) in firsts.items()}

    def _serve(self, engine: Engine, turn: Turn, turns: Turns, now: float) -> None:
        standing = turn.flow
        units = seconds = 0.0
        more = admissible = False
        running = [j for j in self.running[standing] if j.decoding and j not in self._plan]
        running += [j for j in self.running[standing] if not j.decoding]
        only = turn.only
        if only is not None:
            running = [j for j in running if j is only]
        queue = self.waiting[standing]
        while self._left > 0:
            if units >= turn.units or seconds >= turn.seconds:
                more = True
                break
            if running:
                job = running.pop(0)
                if not job.resident:  # it has yielded to an older one of its user
                    continue
            elif queue and (only is None or (queue[0] is only and only not in self._plan)):
                job = queue[0]
                if not self._make_admissible(engine, job, turn, now):
                    break
                admissible = True
                queue.popleft()
                engine.admit(job)
                insort(self.running[standing], job, key=lambda j: (j.arrived, j.name))
                self.policy.admitted(standing)
            else:
                break
            count, cost = self._count(engine, job, turn.units - units, turn.seconds - seconds)
            count = self._make_room(engine, job, count, turn, now)
            if count <= 0:
                continue
            engine.take(job, self._plan.get(job, 0) + count)
            self._plan[job] = self._plan.get(job, 0) + count
            self._left -= count
            units += cost(count)
            seconds += engine.seconds(job, count)
        if queue and only is None and not admissible and self._left > 0:
            admissible = engine.admissible(queue[0])
        turns.served(units, more=more, admissible=admissible, seconds=seconds)
        if len(engine.residents) >= engine.slots and self._stuck:
            turns.admitting = False

    def _count(self, engine: Engine, job: Job, units: float, seconds: float):  # type: ignore[no-untyped-def]
        """Tokens of this turn, and their price."""
        planned = self._plan.get(job, 0)
        if job.decoding:
            price = 0.0 if job.reached > job.computed else 2.0 + 0.002 * (job.computed + 1)
            fits = engine.seconds(job, 1) <= seconds
            return int(fits and not planned), lambda n: price * n
        left = job.known - job.computed - planned
        count = min(left, self._left)
        repeated = max(min(job.reached - job.computed - planned, count), 0)
        if units < inf:
            count = min(count, repeated + max(int(units), 1))
        if seconds < inf:
            count = min(count, int(seconds / engine.speed.prefill))
        return count, lambda n: float(max(n - repeated, 0))

    def _make_admissible(self, engine: Engine, job: Job, turn: Turn, now: float) -> bool:
        while not engine.admissible(job):
            if self._yield(engine, turn, now, self.limits.distance) is None:
                self._stuck = True
                return False
        return True

    def _make_room(self, engine: Engine, job: Job, count: int, turn: Turn, now: float) -> int:
        """As many of `count` as find blocks, once those that must yield have done so."""
        planned = self._plan.get(job, 0)
        while count > 0 and not engine.room(job, planned + count):
            room = (job.blocks + engine.free_blocks) * 16 - (job.computed - job.cached) - planned
            if room > 0:
                return min(count, room)
            if self._yield(engine, turn, now, 0.0, but=job) is None:
                return 0
        return count

    def _yield(self, engine: Engine, turn: Turn, now: float, distance: float, but: Job | None = None) -> Job | None:
        """One sequence loses slot and blocks, if anybody must yield."""
        free = {s: v for s, jobs in self.running.items() if (v := self._youngest(jobs, now, but)) is not None}
        victim = self.policy.victim(turn.flow, free, distance=distance, urgent=turn.urgent)
        if victim is None and but is not None and free.get(turn.flow) is not None:
            own = free[turn.flow]
            victim = turn.flow if (own.arrived, own.name) > (but.arrived, but.name) else None
        if victim is None:
            return None
        self._evict(engine, free[victim])
        return free[victim]

    def _youngest(self, jobs: list[Job], now: float, but: Job | None) -> Job | None:
        for job in reversed(jobs):
            tier = self.standing(job).account.tier
            since, _, first = self.of_tier[tier.name][0]
            kept = first is job and self.policy.protects(tier, now - since)
            if job not in self._plan and job is not but and not kept:
                return job
        return None

    def _evict(self, engine: Engine, job: Job) -> None:
        standing = self.standing(job)
        engine.evict(job)
        self.running[standing].remove(job)
        queue = self.waiting[standing]
        where = sum(1 for j in queue if (j.arrived, j.name) < (job.arrived, job.name))
        queue.insert(where, job)
        self.policy.evicted(standing)


class FifoPlanner:
    """First come, first served; the youngest yields."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def arrived(self, job: Job) -> None:
        self._jobs.append(job)

    def ended(self, job: Job) -> None:
        self._jobs.remove(job)

    withdrawn = ended

    def executed(self, engine: Engine, ran: list[tuple[Job, int, int, int, int]]) -> None:
        pass

    def plan(self, engine: Engine, now: float) -> dict[Job, int]:
        plan: dict[Job, int] = {}
        left = engine.budget
        residents = [j for j in self._jobs if j.resident]
        for job in [j for j in residents if j.decoding] + [j for j in residents if not j.decoding]:
            if not job.resident or left <= 0:
                continue
            while not engine.room(job, 1):
                others = [j for j in self._jobs if j.resident and j not in plan and j is not job]
                if not others or others[-1].name < job.name:
                    break
                engine.evict(others[-1])
            room = (job.blocks + engine.free_blocks) * 16 - (job.computed - job.cached)
            left -= self._add(engine, plan, job, min(1 if job.decoding else job.known - job.computed, left, room))
        for job in self._jobs:
            if left <= 0:
                break
            if not job.resident:
                if not engine.admissible(job):
                    break
                engine.admit(job)
                room = (job.blocks + engine.free_blocks) * 16
                left -= self._add(engine, plan, job, min(job.known - job.computed, left, room))
        if not plan and engine.residents:
            engine.evict([j for j in self._jobs if j.resident][-1])
            return self.plan(engine, now)
        return plan

    @staticmethod
    def _add(engine: Engine, plan: dict[Job, int], job: Job, count: int) -> int:
        if count > 0:
            engine.take(job, count)
            plan[job] = count
        return max(count, 0)
