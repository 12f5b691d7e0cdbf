"""How long the dispatcher's event loop is held by what it does by itself, however little is asked of it; CPU time.

    python benchmarks/dispatcher_pauses.py [--rounds 50]

A tick over kept sessions (ten a second), a round of a session when all histories together have come to their bound, and
the figures of the tiers (two a second and more), with and without the look after gaps that belongs to them once a
second.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from router.dispatch.histories import ENTRY_BYTES, KeptHistories
from router.dispatch.rounds import BeginRound, EndRound
from router.qos.config import Account, QosConfig, Tier
from router.qos.fair_queue import Facts, FairQueue
from router.qos.policy import Limits

HISTORY = b"x" * 200
TTL = 3600.0
WAITING = 10_000
ANY = 10**9


class Request(NamedTuple):
    """What waits."""

    user: str
    arrived: float


def timed(rounds: int, call: Callable[[], object]) -> str:
    """Median and greatest of `rounds` calls, in words."""
    taken = []
    for _ in range(rounds):
        began = time.thread_time()
        call()
        taken.append(1000 * (time.thread_time() - began))
    return f"{statistics.median(taken):8.3f} ms, at most {max(taken):8.3f}"


def of_sessions(sessions: int, owners: int, rounds: int) -> None:
    """A tick, and a round for which another session has to go."""
    now, numbers = [0.0], itertools.count()
    kept = KeptHistories(lambda: now[0], 5.0, max_bytes=sessions * (ENTRY_BYTES + len(HISTORY)))

    def say() -> None:
        number = next(numbers)
        owner = f"owner{number % owners}"
        kept.begin("front", BeginRound(1, owner, number, ANY, TTL))
        kept.end("front", EndRound(owner, number, 0, HISTORY, TTL))

    def tick() -> None:
        now[0] += 0.1
        kept.tick()

    for _ in range(sessions):
        now[0] += 0.001
        say()
    assert len(kept) == sessions
    print(f"{sessions:7,} sessions of {owners:7,} owners: a tick {timed(rounds, tick)};", end=" ")
    print(f"a round without room {timed(rounds, say)}")
    assert len(kept) == sessions


def of_tiers(users: int, rounds: int) -> None:
    """The figures of four tiers with WAITING requests of `users`, all of the last tier but the one that came last."""
    rng, now = random.Random(0), [0.0]
    tiers = tuple(Tier(rank, f"T{rank}", max_queued=ANY, max_queued_per_user=ANY) for rank in range(4))
    accounts = (Account(tiers[n % 4], f"u{n}", rng.uniform(1.0, 99.0)) for n in range(users))
    queue: FairQueue[Request] = FairQueue(
        QosConfig(tiers, tuple(accounts)),
        Limits(step=100_000.0),
        describe=lambda r: Facts(r.user, "", 500.0, r.arrived),
        clock=lambda: now[0],
        limit=ANY,
    )
    for number in range(WAITING + 300):
        queue.push(f"r{number}", Request(f"u{4 * rng.randrange(users // 4) + 3}", now[0]))
        now[0] += 0.001
    for _ in range(300):  # it learns how fast it goes
        queue.granted(queue.first() or "")
        now[0] += 0.01
    queue.push("last", Request("u0", now[0]))

    def looked() -> None:
        now[0] += 1.0
        queue.tiers()

    print(f"{WAITING:,} requests of {users:6,} users wait: tiers {timed(rounds, queue.tiers)};", end=" ")
    print(f"with gaps {timed(rounds, looked)}")


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    for sessions in (1_000, 10_000, 100_000):
        for owners in (sessions, sessions // 1000):
            of_sessions(sessions, owners, rounds)
    for users in (4, 1_000, 10_000):
        of_tiers(users, rounds)


if __name__ == "__main__":
    main()
