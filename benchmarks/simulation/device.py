"""What a simulated device takes for a step (`StepCost`), and an executor that takes it in virtual time.

Everything above the executor is the shipped engine. Beside the engine's books stand those of `Books`, counted here from
the plans alone: a guarantee is never measured with the arithmetic of what it is to judge.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from simulation.jobs import Job
from workers.engine.plan import SlotResult, StepPlan, StepResult

WEIGHTS = (1.0, 2.0, 0.002)  # units of service: a prefill token, a decode token, a KV token that a decode reads


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step, for an 8B model in bf16: by default on an H100, about."""

    base: float = 0.005  # reading the weights
    prefill: float = 25e-6  # a prompt token
    row: float = 20e-6  # a decoding sequence
    kv: float = 43e-9  # a KV token read by a decode
    pair: float = 0.0  # a prompt token and a position that it looks back on

    def seconds(self, prefill: float, rows: float, kv: float, pairs: float = 0.0) -> float:
        """Of one step."""
        return self.base + prefill * self.prefill + rows * self.row + kv * self.kv + pairs * self.pair

    def slower(self, times: float) -> StepCost:
        """Of a device that takes `times` as long for all."""
        return replace(
            self,
            base=self.base * times,
            prefill=self.prefill * times,
            row=self.row * times,
            kv=self.kv * times,
            pair=self.pair * times,
        )


LOOKING_BACK = StepCost(prefill=20e-6, pair=2.5e-9)  # 700 tokens behind 3,500: 14 ms, and 7 ms for looking back
A10G = StepCost(base=0.026, prefill=0.17e-3, row=0.1e-3, kv=0.9e-6)  # a 7B model with 16-bit K and V of all heads


@dataclass(slots=True)
class Served:
    """What was executed for one user, each position once; tokens."""

    prefill: int = 0
    decode: int = 0
    kv_read: int = 0

    @property
    def units(self) -> float:
        """Useful service."""
        return WEIGHTS[0] * self.prefill + WEIGHTS[1] * self.decode + WEIGHTS[2] * self.kv_read

    @property
    def plain(self) -> float:
        """As VTC counts it: what decodes read is free."""
        return WEIGHTS[0] * self.prefill + WEIGHTS[1] * self.decode


class Books:
    """Who was served what, by user; `overhead` are positions run again, or for a request that had ended."""

    def __init__(self) -> None:
        self.users: dict[str, Served] = defaultdict(Served)
        self.executed = self.overhead = 0

    def ran(self, job: Job, start: int, count: int) -> None:
        """Positions [start, start + count) of `job` were executed."""
        self.executed += count
        end, reached = start + count, job.reached
        if job.ended is not None or end <= reached:
            self.overhead += count
            return
        first = max(start, reached)
        job.reached = end
        served = self.users[job.user]
        prefill = max(min(end, job.prompt) - first, 0)
        decode = end - first - prefill
        self.overhead += first - start
        served.prefill += prefill
        served.decode += decode
        served.kv_read += decode * (2 * end - decode + 1) // 2


class VirtualDevice:
    """An executor: a step takes what `cost` says, every draw is the same token.

    Requests carry the number of their job as their sampling seed; `jobs` has them by it. `seconds` is the time of the
    last step whose result was asked for; `busy` that of all, `repeats` the part for positions run again.
    """

    def __init__(self, cost: StepCost, jobs: dict[int, Job], slots: int, books: Books | None = None) -> None:
        self.cost, self.books = cost, books
        self.seconds = self.busy = self.repeats = self.longest = 0.0
        self.submitted = 0
        self.kv_tokens = 0
        self._jobs = jobs
        self._slots: list[Job | None] = [None] * slots
        self._answers = [SlotResult(slot, (7,)) for slot in range(slots)]

    def submit(self, plan: StepPlan) -> _Handle:
        """Start a step."""
        slots = self._slots
        self.submitted += 1
        for slot in plan.removed:
            slots[slot] = None
        for new in plan.added:
            job = self._jobs[new.sampling.seed]
            slots[new.slot] = job
            job.residencies += 1
            if job.residencies == 1:
                block_hits = plan_start(plan, new.slot)
                job.cached = job.reached = block_hits
        prefill = rows = kv = 0
        pairs = 0.0
        work: list[tuple[Job, int, int]] = []
        answers = []
        for run in plan.scheduled:
            job = slots[run.slot]
            assert job is not None, f"slot {run.slot} runs, but nobody is in it"
            if run.start >= job.prompt and run.count == 1:
                rows += 1
                kv += run.start + 1
            else:
                prefill += run.count
                pairs += run.count * (run.start + run.count / 2)
            work.append((job, run.start, run.count))
            if run.emit:
                answers.append(self._answers[run.slot])
        seconds = self.cost.seconds(prefill, rows, kv, pairs)
        return _Handle(self, StepResult(plan.step, tuple(answers), seconds), work)

    def done(self, result: StepResult, work: list[tuple[Job, int, int]]) -> None:
        """The result of a step is asked for."""
        self.seconds = result.seconds
        self.busy += result.seconds
        self.longest = max(self.longest, result.seconds)
        if self.books is not None:
            before = self.books.overhead
            for job, start, count in work:
                self.books.ran(job, start, count)
            self.repeats += (self.books.overhead - before) * self.cost.prefill


def plan_start(plan: StepPlan, slot: int) -> int:
    """The first position that `plan` runs in `slot`; those before were found in the prefix cache."""
    return next((run.start for run in plan.scheduled if run.slot == slot), 0)


@dataclass(slots=True)
class _Handle:
    device: VirtualDevice
    answer: StepResult
    work: list[tuple[Job, int, int]]

    def result(self) -> StepResult:
        """It is done."""
        self.device.done(self.answer, self.work)
        return self.answer
