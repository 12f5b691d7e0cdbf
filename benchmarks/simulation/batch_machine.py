"""A replica for thousands of them: rows of a batch are counted, not planned one by one.

The same cost of a step as a shipped engine of the same shape that serves first come, first served, with room for all:
a step runs all decodes, then prompts in the order they came as far as the budget goes. What differs: no block tables,
so nobody is ever preempted (the dispatcher's own reservation of blocks bounds who is there), and no step planned ahead.
`tests/simulation` holds it against the engine.
"""

from __future__ import annotations

import heapq
from collections import deque

from simulation.jobs import Job
from simulation.replica import BLOCK, Shape
from workers.api.ordering import ServiceSync
from workers.api.replica import CacheNews, LoadReport
from workers.api.request import Delta, FinishReason

_TOKEN = (7,)


class BatchMachine:
    """Steps in O(log n) for each request that begins or ends in it, whatever the batch."""

    def __init__(self, shape: Shape, jobs: dict[int, Job]) -> None:
        self.shape = shape
        self.waiting: deque[Job] = deque()
        self._blocks = shape.pool // BLOCK
        self._prefilling: deque[list[int]] = deque()  # [job number, tokens left]
        self._ends: list[tuple[int, int]] = []  # (the step that draws the last token, job number)
        self._jobs = jobs
        self._rows = self._kv = self._backlog = self._steps = 0
        self._last = LoadReport(step=0, free_blocks=self._blocks, total_blocks=self._blocks)

    def submit(self, job: Job, now: float) -> None:
        """It waits for a slot."""
        self.waiting.append(job)
        self._backlog += job.prompt

    @property
    def busy(self) -> bool:
        """Whether anybody is there."""
        return bool(self._rows or self._prefilling or self.waiting)

    def step(self, now: float) -> tuple[float, list[Delta]]:
        """One token of each row, then prompts."""
        self._steps += 1
        rows, decoded_kv = self._rows, self._kv + self._rows
        self._kv = decoded_kv
        deltas = [self._end(number) for number in self._ended()]
        ended = len(deltas)
        while self.waiting and self._rows + ended + len(self._prefilling) < self.shape.slots:
            job = self.waiting.popleft()
            self._prefilling.append([job.number, job.prompt])
        left = self.shape.budget - rows
        prefilled, pairs = 0, 0.0
        while left > 0 and self._prefilling:
            head = self._prefilling[0]
            run = min(left, head[1])
            pairs += run * (self._jobs[head[0]].prompt - head[1] + run / 2)
            head[1] -= run
            left -= run
            prefilled += run
            if not head[1]:
                self._prefilling.popleft()
                deltas.append(self._begin(self._jobs[head[0]]))
        self._backlog -= prefilled
        seconds = self.shape.cost.seconds(prefilled, rows, decoded_kv, pairs)
        self._last = LoadReport(
            step=self._steps,
            step_seconds=seconds,
            prefill_tokens=prefilled,
            decode_tokens=rows,
            running=self._rows + len(self._prefilling),
            waiting=len(self.waiting),
            prefill_backlog=self._backlog,
            kv_tokens=self._kv,
            free_blocks=max(self._blocks - self._kv // BLOCK - self._rows, 0),
            total_blocks=self._blocks,
        )
        return seconds, deltas

    def load(self) -> LoadReport:
        """After the last step."""
        return self._last

    def news(self) -> CacheNews | None:
        """It has no prefix cache."""
        return None

    def service(self, now: float) -> None:
        """It counts for nobody: leases are charged when they end."""

    def sync(self, message: ServiceSync) -> None:
        """Its steps have no order."""

    def _ended(self) -> list[int]:
        ended = []
        while self._ends and self._ends[0][0] == self._steps:
            ended.append(heapq.heappop(self._ends)[1])
        return ended

    def _begin(self, job: Job) -> Delta:
        """Its prompt is done: its first token is drawn."""
        if job.output == 1:
            return Delta(job.name, 0, _TOKEN, finish=FinishReason.LENGTH, executed_prefill=job.prompt)
        self._rows += 1
        self._kv += job.prompt
        heapq.heappush(self._ends, (self._steps + job.output - 1, job.number))
        return Delta(job.name, 0, _TOKEN)

    def _end(self, number: int) -> Delta:
        """Its last token is drawn: that one is never run."""
        job = self._jobs[number]
        self._rows -= 1
        self._kv -= job.prompt + job.output - 1
        return Delta(
            job.name,
            1,
            _TOKEN * (job.output - 1),
            finish=FinishReason.LENGTH,
            executed_prefill=job.prompt,
            executed_decode=job.output - 1,
        )
