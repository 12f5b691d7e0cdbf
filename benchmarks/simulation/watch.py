"""What is measured while an engine runs: gaps between users who wait, and service over time. From `Books` alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from simulation.device import Served
from simulation.replica import Bench

Measure = Callable[[Served], float]


def units(served: Served) -> float:
    """Useful service."""
    return served.units


def plain(served: Served) -> float:
    """As VTC counts it."""
    return served.plain


class Gaps:
    """For each pair of users: by how much the difference of service / quota moved while both waited.

    `worst` is the most over any interval; `start` the most in the first one, for users who all begin with it.
    """

    def __init__(self, quotas: dict[str, float], *, measure: Measure = units) -> None:
        self._quotas, self._measure = quotas, measure
        self._pairs = list(combinations(quotas, 2))
        self._now: dict[tuple[str, str], list[float]] = {}  # least and greatest of the interval that runs
        self._started: set[tuple[str, str]] = set()
        self.worst: dict[tuple[str, str], float] = dict.fromkeys(self._pairs, 0.0)
        self.start: dict[tuple[str, str], float] = dict.fromkeys(self._pairs, 0.0)

    def __call__(self, bench: Bench) -> None:
        """After a step."""
        waiting, users = bench.waiting, bench.books.users
        for pair in self._pairs:
            a, b = pair
            if a not in waiting or b not in waiting:
                if self._now.pop(pair, None) is not None:
                    self._started.add(pair)
                continue
            gap = self._measure(users[a]) / self._quotas[a] - self._measure(users[b]) / self._quotas[b]
            seen = self._now.get(pair)
            if seen is None:
                seen = self._now[pair] = [gap, gap]
            seen[0], seen[1] = min(seen[0], gap), max(seen[1], gap)
            self.worst[pair] = max(self.worst[pair], seen[1] - seen[0])
            if pair not in self._started:
                self.start[pair] = max(self.start[pair], abs(gap))

    def part(self, bound: Callable[[float], float]) -> float:
        """The greatest gap of all pairs, as a part of `bound(the lesser quota)`."""
        return max((w / bound(min(self._quotas[a], self._quotas[b])) for (a, b), w in self.worst.items()), default=0.0)


class Service:
    """Service of each user every `every` seconds."""

    def __init__(self, every: float, *, measure: Measure = units) -> None:
        self._every, self._measure = every, measure
        self.rows: list[tuple[float, dict[str, float]]] = []

    def __call__(self, bench: Bench) -> None:
        """After a step."""
        if not self.rows or bench.now >= self.rows[-1][0] + self._every:
            self.rows.append((bench.now, {u: self._measure(s) for u, s in bench.books.users.items()}))


class Waits:
    """Seconds through which each user waited."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.served: dict[str, float] = {}  # total service of all, over times with this user waiting
        self._last = self._total = 0.0

    def __call__(self, bench: Bench) -> None:
        """After a step."""
        total = sum(s.units for s in bench.books.users.values())
        for user in bench.waiting:
            self.seconds[user] = self.seconds.get(user, 0.0) + bench.now - self._last
            self.served[user] = self.served.get(user, 0.0) + total - self._total
        self._last, self._total = bench.now, total
