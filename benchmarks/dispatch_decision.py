"""Microseconds of one dispatcher decision: `python benchmarks/dispatch_decision.py`.

Idle queue: an acquire that is granted at once, then its settle. With requests queued: a settle on full replicas, which
places the head of the queue; and an acquire that joins the queue. Median and p99 of single calls in CPU time of
the thread (other work of the machine is left out), garbage collection on.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Acquire, Granted, Outcome, Settle
from workers.api.replica import LoadReport, ReplicaInfo

SLOTS = 64


def make(replicas: int, strategy: str, rng: random.Random, now: list[float]) -> Dispatcher:
    dispatcher = Dispatcher(DispatcherConfig(strategy=strategy, max_waiting=20_000), clock=lambda: now[0], rng=rng)
    for i in range(replicas):
        dispatcher.replica_up(ReplicaInfo(f"r{i}", "m", "h", 1, 32768, SLOTS, 100_000, 16))
        for step in range(5):
            load = LoadReport(step, rng.uniform(0.01, 0.02), 0, 8, running=8, kv_tokens=4000, total_blocks=0)
            dispatcher.load(f"r{i}", load)
    return dispatcher


def ask(number: int, rng: random.Random) -> Acquire:
    owner = f"owner{rng.randrange(1000)}"
    return Acquire(f"lease{number}", "m", rng.randrange(16, 2000), rng.randrange(16, 512), owner=owner, route="chat")


def timed(call: Callable[[], object], into: list[float]) -> object:
    start = thread_time_ns()
    result = call()
    into.append((thread_time_ns() - start) / 1000)
    return result


def measure(replicas: int, queued: int, strategy: str, rounds: int) -> dict[str, list[float]]:
    rng = random.Random(0)
    now = [0.0]
    dispatcher = make(replicas, strategy, rng, now)
    times: dict[str, list[float]] = {"acquire": [], "settle": [], "load": []}
    number, held = 0, []
    while queued and dispatcher.waiting < queued:
        request = ask(number, rng)
        number += 1
        if isinstance(dispatcher.acquire("i", request), Granted):
            held.append(request.lease_id)
    for i in range(rounds):
        now[0] += 0.001
        request = ask(number, rng)
        number += 1
        answer = timed(lambda: dispatcher.acquire("i", request), times["acquire"])  # noqa: B023
        if isinstance(answer, Granted):
            held.append(request.lease_id)
        if queued or len(held) > replicas * SLOTS // 2:
            gone = held.pop(rng.randrange(len(held)))
            settle = Settle(gone, Outcome.COMPLETED, output_tokens=100)
            replies = timed(lambda: dispatcher.settle(settle), times["settle"])  # noqa: B023
            held += [r.message.lease_id for r in replies]  # type: ignore[attr-defined]
        load = LoadReport(10 + i, 0.01, 0, 8, running=8, kv_tokens=4000, total_blocks=0)
        timed(lambda: dispatcher.load(f"r{i % replicas}", load), times["load"])  # noqa: B023
    ledger = dispatcher.ledger()
    assert ledger.balanced, ledger
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--strategy", default="min_expected_latency")
    args = parser.parse_args()
    print(
        f"{'replicas':>8} {'queued':>7}  "
        + "  ".join(f"{k + ' p50':>12} {'p99':>6}" for k in ("acquire", "settle", "load"))
    )
    for replicas in (2, 16, 64):
        for queued in (0, 10_000):
            times = measure(replicas, queued, args.strategy, args.rounds)
            cells = []
            for values in times.values():
                cells.append(f"{statistics.median(values):>12.1f} {statistics.quantiles(values, n=100)[98]:>6.1f}")
            print(f"{replicas:>8} {queued:>7}  " + "  ".join(cells) + "   us")


if __name__ == "__main__":
    main()
