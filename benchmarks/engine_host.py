"""What the host does per step: plan, submit and commit of the engine, without any model.

    python benchmarks/engine_host.py [--steps 400]

Each row runs B sequences over an executor that answers at once; the executor's own time is taken off. Microseconds of
CPU time (`time.thread_time`: on a busy machine the wall clock measures the neighbours). `decode` is steady decode. In
`mixed` each sequence ends after 33 to 64 tokens and a new prompt of 256, half of it a common prefix, takes its place;
submitting it is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

from workers.api.config import EngineConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.engine.plan import SlotResult, StepPlan, StepResult


@dataclass
class Instant:
    """An executor whose model always says 7."""

    seconds: float = 0.0  # spent here
    results: list[StepResult] = field(default_factory=list)

    def submit(self, plan: StepPlan) -> Instant:
        began = time.thread_time()
        slots = tuple([SlotResult(s.slot, (7,)) for s in plan.scheduled if s.emit])
        self.results.append(StepResult(plan.step, slots, 0.0))
        self.seconds += time.thread_time() - began
        return self

    def result(self) -> StepResult:
        return self.results.pop(0)


def measure(batch: int, steps: int, *, mixed: bool, step_ahead: bool) -> tuple[float, float, float]:
    """(median, mean, 99th percentile) in microseconds per step."""
    executor = Instant()
    config = EngineConfig(max_num_seqs=batch, max_num_batched_tokens=max(2048, batch), step_ahead=step_ahead)
    engine = Engine(config, executor, num_blocks=batch * 128, max_model_len=2048)
    common = tuple(range(128))
    made = 0

    def arrive() -> None:
        nonlocal made
        made += 1
        own = tuple((made * 31 + i) % 5000 for i in range(128))
        max_tokens = 64 - made % 32 if mixed else 1500
        engine.submit(EngineRequest(str(made), common + own, SamplingParams(max_tokens=max_tokens, stop_ids=(2,))))

    for _ in range(batch):
        arrive()
    while engine.load().prefill_backlog:
        engine.step()
    times = []
    for _ in range(steps):
        executor.seconds = 0.0
        began = time.thread_time()
        deltas = engine.step()
        times.append((time.thread_time() - began - executor.seconds) * 1e6)
        for delta in deltas:
            if delta.finish is not None:
                arrive()
    times.sort()
    return statistics.median(times), statistics.fmean(times), times[int(len(times) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    print(f"{'B':>5} {'load':>8} {'ahead':>6} {'median us':>10} {'mean us':>9} {'p99 us':>8} {'us/sequence':>12}")
    for batch in (1, 64, 256):
        for mixed in (False, True):
            for step_ahead in (False, True):
                median, mean, p99 = measure(batch, steps, mixed=mixed, step_ahead=step_ahead)
                load = "mixed" if mixed else "decode"
                ahead = "yes" if step_ahead else "no"
                print(f"{batch:5} {load:>8} {ahead:>6} {median:10.0f} {mean:9.0f} {p99:8.0f} {mean / batch:12.2f}")


if __name__ == "__main__":
    main()
