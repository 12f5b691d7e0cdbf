"""A fake engine under a virtual clock: slots, a KV pool, steps that take time. It knows nothing of the policy.

What it counts, it counts for itself: useful and repeated positions by account, units by a formula of its own, times of
first and last tokens. Planners (see `planners`) say what runs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

BLOCK = 16  # tokens


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: an H100 with an 8B model, about."""

    base: float = 0.005
    prefill: float = 25e-6
    sequence: float = 20e-6
    kv: float = 43e-9

    def step(self, prefill: int, sequences: int, kv: int) -> float:
        return self.base + prefill * self.prefill + sequences * self.sequence + kv * self.kv


@dataclass(eq=False)
class Job:
    """One request. `cached` prompt tokens lie in the prefix cache, outside of the pool."""

    name: int
    user: str
    prompt: int
    output: int
    arrived: float
    cached: int = 0
    computed: int = 0  # positions in the KV cache
    reached: int = 0  # positions ever executed, or cached
    blocks: int = 0
    resident: bool = False
    evictions: int = 0
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    gaps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.computed = self.reached = self.cached
        self.emitted = 0

    @property
    def known(self) -> int:
        """Tokens that can be computed: the prompt and what was emitted."""
        return self.prompt + self.emitted

    @property
    def decoding(self) -> bool:
        return self.emitted > 0 and self.computed == self.known - 1


class Planner(Protocol):
    """Says what runs, and hears what happened."""

    def arrived(self, job: Job) -> None: ...
    def plan(self, engine: Engine, now: float) -> dict[Job, int]: ...
    def executed(self, engine: Engine, ran: list[tuple[Job, int, int, int, int]]) -> None: ...
    def ended(self, job: Job) -> None: ...
    def withdrawn(self, job: Job) -> None: ...


class Engine:
    """`slots` sequences, `budget` tokens a step, `pool` tokens of KV cache."""

    def __init__(
        self, planner: Planner, *, slots: int = 64, budget: int = 2048, pool: int = 60_000, speed: Speed | None = None
    ) -> None:
        self.planner, self.slots, self.budget, self.pool = planner, slots, budget, pool
        self.speed = speed or Speed()
        self.now = self.busy = 0.0
        self.steps = 0
        self.free_blocks = pool // BLOCK
        self.residents: list[Job] = []
        self.waiting: set[Job] = set()
        self.done: list[Job] = []
        self.executed = self.repeated = self.tokens = 0
        self.useful: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # prefill, decode, KV read
        self.units: dict[str, float] = defaultdict(float)
        self.samples: list[tuple[float, dict[str, float], frozenset[str]]] = []  # time, units, who waits
        self.sample = False
        self.empty_plans = 0
        self.repeat_seconds = 0.0

    # what planners may do

    def room(self, job: Job, tokens: int) -> bool:
        """Whether `tokens` more positions of a resident find blocks."""
        return self._more_blocks(job, tokens) <= self.free_blocks

    def admissible(self, job: Job) -> bool:
        """Whether a slot and, with room for all to grow, blocks are there for it."""
        if len(self.residents) >= self.slots:
            return False
        if not self.residents:
            return True
        rest = sum(r.known - r.computed for r in self.residents if not r.decoding)
        headroom = 64 << min(job.evictions, 20)  # as the engine's own watermark: more for who was evicted before
        wanted = headroom * (len(self.residents) + 1) + rest + job.known - job.cached
        return wanted <= self.free_blocks * BLOCK

    def admit(self, job: Job) -> None:
        assert job in self.waiting
        assert len(self.residents) < self.slots
        self.waiting.remove(job)
        self.residents.append(job)
        job.resident = True

    def evict(self, job: Job) -> None:
        self.residents.remove(job)
        self.waiting.add(job)
        self._leave(job)
        job.evictions += 1

    def take(self, job: Job, tokens: int) -> None:
        """Blocks for `tokens` more positions."""
        assert job.resident
        more = self._more_blocks(job, tokens)
        assert more <= self.free_blocks
        self.free_blocks -= more
        job.blocks += more

    def seconds(self, job: Job, tokens: int) -> float:
        """What `tokens` of it add to a step, as predicted."""
        if job.decoding:
            return self.speed.step(0, 1, job.computed + 1) - self.speed.base
        return tokens * self.speed.prefill

    # the outside

    def submit(self, job: Job) -> None:
        self.waiting.add(job)
        self.planner.arrived(job)

    def cancel(self, job: Job) -> None:
        """Its client is gone."""
        if job.ended is not None:
            return
        job.ended = self.now
        if job.resident:
            self.residents.remove(job)
            self._leave(job)
            self.planner.ended(job)
        else:
            self.waiting.discard(job)
            self.planner.withdrawn(job)

    def step(self) -> bool:
        """Run one step; False if there was nothing to run."""
        plan = self.planner.plan(self, self.now)
        assert sum(plan.values()) <= self.budget
        if not plan:
            self.empty_plans += bool(self.waiting or self.residents)
            return False
        prefill = sum(n for j, n in plan.items() if not j.decoding)
        decodes = [j for j in plan if j.decoding]
        seconds = self.speed.step(prefill, len(decodes), sum(j.computed + 1 for j in decodes))
        self.now += seconds
        self.busy += seconds
        self.steps += 1
        ran = [self._run(job, count, seconds) for job, count in plan.items()]
        self.executed += sum(plan.values())
        self.planner.executed(self, ran)
        for job in plan:
            if job.emitted >= job.output and job.ended is None:
                job.ended = self.now
                self.residents.remove(job)
                self._leave(job)
                self.done.append(job)
                self.planner.ended(job)
        if self.sample:
            waiting = frozenset(j.user for j in self.waiting)
            self.samples.append((self.now, dict(self.units), waiting))
        return True

    def run(self, jobs: Iterable[Job], *, until: float = float("inf"), steps: int = 10**9) -> None:
        """Feed `jobs` as they arrive and step until all is done, or until a time or a number of steps."""
        coming = deque(sorted(jobs, key=lambda j: (j.arrived, j.name)))
        while steps > 0 and self.now < until:
            while coming and coming[0].arrived <= self.now:
                self.submit(coming.popleft())
            if not self.step():
                if not coming:
                    assert not self.waiting, f"{len(self.waiting)} wait and nothing runs"
                    assert not self.residents
                    break
                self.now = max(self.now, coming[0].arrived)
            steps -= 1
        self.check()

    def check(self) -> None:
        """The books of the pool."""
        assert self.free_blocks + sum(j.blocks for j in self.residents) == self.pool // BLOCK
        assert self.executed == self.repeated + sum(p + d for p, d, _ in self.useful.values())

    # inside

    def _more_blocks(self, job: Job, tokens: int) -> int:
        return -(-(job.computed - job.cached + tokens) // BLOCK) - job.blocks

    def _leave(self, job: Job) -> None:
        self.free_blocks += job.blocks
        job.blocks, job.computed, job.resident = 0, job.cached, False

    def _run(self, job: Job, count: int, seconds: float) -> tuple[Job, int, int, int, int]:
        """Positions [computed, computed + count): which are new, and of what kind."""
        start, end = job.computed, job.computed + count
        assert end <= job.known
        prefill = decode = kv = repeated = 0
        for first, last, is_prompt in ((start, min(end, job.prompt), True), (max(start, job.prompt), end, False)):
            if last > first:
                fresh = max(last - max(first, job.reached), 0)
                repeated += last - first - fresh
                if is_prompt:
                    prefill += fresh
                else:
                    decode += fresh
                    kv += sum(p + 1 for p in range(last - fresh, last))
        job.computed, job.reached = end, max(job.reached, end)
        self.repeated += repeated
        self.repeat_seconds += repeated * self.speed.prefill
        mine = self.useful[job.user]
        mine[0] += prefill
        mine[1] += decode
        mine[2] += kv
        self.units[job.user] += prefill + 2.0 * decode + 0.002 * kv
        if end == job.known and job.emitted < job.output:
            job.emitted += 1
            self.tokens += 1
            if job.first_token is None:
                job.first_token = self.now
            elif job.last_token is not None:
                job.gaps.append(self.now - job.last_token)
            job.last_token = self.now
        return job, prefill, decode, kv, repeated
