"""The shipped engine on a virtual device, and a loop that feeds one of them; time passes only as steps take it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from simulation.device import Books, StepCost, VirtualDevice
from simulation.jobs import Job
from workers.api.config import EngineConfig
from workers.api.ordering import Ordering
from workers.api.request import Delta
from workers.engine.core import Engine

BLOCK = 16  # tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """One replica: `slots` sequences, `budget` tokens a step, `pool` tokens of KV cache."""

    slots: int = 64
    budget: int = 2048
    pool: int = 437_000
    cost: StepCost = StepCost()
    prefix_caching: bool = False
    step_ahead: bool = True


class VirtualReplica:
    """An engine whose device is a model. `step` returns deltas that are there `seconds` later."""

    def __init__(self, shape: Shape, jobs: dict[int, Job], *, ordering: Ordering | None = None, books: bool = True):
        config = EngineConfig(
            block_size=BLOCK,
            max_num_seqs=shape.slots,
            max_num_batched_tokens=shape.budget,
            prefix_caching=shape.prefix_caching,
            step_ahead=shape.step_ahead,
        )
        self.shape = shape
        self.books = Books() if books else None
        self.device = VirtualDevice(shape.cost, jobs, shape.slots, self.books)
        self.now = 0.0
        blocks = shape.pool // BLOCK
        self.engine = Engine(
            config,
            self.device,
            num_blocks=blocks,
            max_model_len=blocks * BLOCK,
            ordering=ordering,
            clock=lambda: self.now,
        )
        self.empty_plans = 0

    def step(self, now: float) -> tuple[float, list[Delta]]:
        """One step of the engine at `now`: how long it took, and what came of it."""
        self.now = now
        device = self.device
        device.seconds = 0.0
        before = device.submitted
        deltas = self.engine.step()
        if not device.seconds and device.submitted == before and not deltas and self.engine.roster.live:
            self.empty_plans += 1  # nothing was in flight, nothing was planned, and somebody waits
        return device.seconds, deltas


class Bench:
    """One replica without a dispatcher: whatever arrives goes to its engine at once."""

    def __init__(self, shape: Shape, ordering: Ordering | None = None) -> None:
        self.jobs: dict[int, Job] = {}
        self.replica = VirtualReplica(shape, self.jobs, ordering=ordering)
        self.books = self.replica.books or Books()
        self.now = 0.0
        self.live: Counter[str] = Counter()  # requests of each user that have not ended
        self.by_name: dict[str, Job] = {}
        self._coming: deque[Job] = deque()
        self.each_step: list[Callable[[Bench], None]] = []
        self.at_arrival: Callable[[Job], bool] = lambda job: True  # False: it is refused

    @property
    def waiting(self) -> set[str]:
        """Users with requests that hold no slot."""
        resident = Counter(s.request.owner for s in self.replica.engine.roster.residents)
        return {user for user, n in self.live.items() if n > resident[user]}

    def submit(self, job: Job) -> None:
        self.jobs[job.number] = job
        if not self.at_arrival(job):
            job.refused, job.ended = True, self.now
            return
        self.by_name[job.name] = job
        self.live[job.user] += 1
        self.replica.now = self.now
        self.replica.engine.submit(job.request())

    def cancel(self, job: Job) -> None:
        """Its client is gone."""
        if job.name in self.by_name:
            self.replica.engine.abort(job.name)
            self._end(job)

    def run(self, jobs: Iterable[Job], *, until: float = inf, steps: float = inf) -> Bench:
        """Until all has ended, or a time, or a number of steps; jobs that did not come yet come in the next run."""
        coming = self._coming = deque(sorted((*self._coming, *jobs), key=lambda j: (j.arrived, j.number)))
        engine = self.replica.engine
        while self.now < until and steps > 0:
            while coming and coming[0].arrived <= self.now:
                self.submit(coming.popleft())
            if not engine.has_work:
                if not coming:
                    break
                self.now = coming[0].arrived
                continue
            steps -= 1
            seconds, deltas = self.replica.step(self.now)
            if self.replica.empty_plans:
                raise AssertionError("an empty plan while requests wait and nothing is in flight")
            self.now += seconds
            for delta in deltas:
                self._take(delta)
            if seconds:
                for look in self.each_step:
                    look(self)
        engine.check_ledgers()
        return self

    def _take(self, delta: Delta) -> None:
        job = self.by_name.get(delta.request_id)
        if job is None:
            return
        if delta.token_ids:
            job.emit(len(delta.token_ids), self.now)
        if delta.finish is not None:
            self._end(job)

    def _end(self, job: Job) -> None:
        job.ended = self.now
        del self.by_name[job.name]
        self.live[job.user] -= 1
