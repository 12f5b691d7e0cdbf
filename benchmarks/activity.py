"""What a look at the cluster costs the dispatcher: how long it holds its event loop at once, and in all; CPU time.

    python benchmarks/activity.py [--waiting 10000] [--users 1000] [--leases 256] [--looks 40]

A dispatcher without sockets, full of requests, with tiers and without. `/cluster` is an operator's look, `/me` that of
one user. Between two slices of a look others have their turn; the longest slice is what they wait for.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from router.dispatch.config import DispatcherConfig
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.lease import Acquire
from router.qos.config import Account, QosConfig, Tier
from workers.api.replica import ReplicaInfo

SLOTS = 128
TIERS = tuple(Tier(rank, name) for rank, name in enumerate(("Platinum", "Gold", "Silver", "Bronze")))


def full(qos: QosConfig | None, *, waiting: int, users: int, leases: int) -> Dispatcher:
    """With `leases` requests that run and `waiting` that wait."""
    dispatcher = Dispatcher(
        DispatcherConfig(qos=qos, max_waiting=2 * waiting, models=("m",)), clock=time.monotonic, rng=random.Random(0)
    )
    for n in range(-(-leases // SLOTS)):
        slots = min(SLOTS, leases - n * SLOTS)
        dispatcher.replica_up(ReplicaInfo(f"r{n}", "m", "h", 1, 4096, slots, 1 << 20, 16))
    for n in range(waiting + leases):
        owner, tier = f"user{n % users}", TIERS[n % users % len(TIERS)].name
        dispatcher.acquire("front", Acquire(f"l{n}", "m", 500, 200, owner=owner, tier=tier, name=f"request-{n}.x"))
    assert dispatcher.waiting == waiting, dispatcher.waiting
    return dispatcher


def looked(dispatcher: Dispatcher, owner: str | None) -> list[float]:
    """Seconds of CPU of each slice of one look."""
    slices, began = [], time.thread_time()
    if owner is not None:
        json.dumps(dispatcher.standing(owner, "Gold"))
        return [time.thread_time() - began]
    look = dispatcher.activity()
    while True:
        try:
            next(look)
            found = None
        except StopIteration as end:
            found = end.value
        now = time.thread_time()
        slices.append(now - began)
        began = now
        if found is not None:
            json.dumps(found).encode()
            return [*slices, time.thread_time() - began]


def spread(values: list[float]) -> str:
    ms = [1000 * v for v in values]
    return f"{statistics.median(ms):.2f} ms ({min(ms):.2f} to {max(ms):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("waiting", 10_000), ("users", 1000), ("leases", 256), ("looks", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    accounts = tuple(Account(tier, "default", 25.0) for tier in TIERS)
    own = tuple(Account(TIERS[n % 4], f"user{n}", 1.0) for n in range(args.users))
    for title, qos in (("tiers", QosConfig(TIERS, own + accounts)), ("no tiers", None)):
        dispatcher = full(qos, waiting=args.waiting, users=args.users, leases=args.leases)
        gc.freeze()
        for route, owner in (("/cluster", None), ("/me", "user7")):
            looks = [looked(dispatcher, owner) for _ in range(args.looks)]
            print(
                f"{title}, {route}: held at once {spread([max(one) for one in looks])}, in all "
                f"{spread([sum(one) for one in looks])}, n={args.looks}",
                flush=True,
            )


if __name__ == "__main__":
    main()
