"""Which of the replicas that have room. The request itself is always counted in.

Every strategy is deterministic given its random generator. Candidates are never empty, and stand in the order in which
they were registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from router.dispatch.table import Demand, Replica
from workers.api.errors import ConfigError


class Strategy(Protocol):
    """Chooses a replica."""

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""


class MinExpectedLatency:
    """The least expected seconds; among equals the one with fewer slots in use, then the one registered first."""

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        prefill, output, choices, now = demand.prefill, demand.output, demand.choices, demand.at
        told = demand.prompt is not None
        best, least = candidates[0], float("inf")
        for r in candidates:  # Replica.expected, written out: this loop is most of a decision
            step = r.step_seconds + r.seq_seconds * choices + r.kv_seconds * prefill
            own = r.uncached(demand) if told else prefill
            seconds = r.lag + r.queue_seconds + own * r.token_seconds + output * step
            if r.step_ends > now:
                seconds += r.step_ends - now
            if seconds < least or (seconds == least and r.slots < best.slots):
                best, least = r, seconds
        return best


class MinObservedLatency:
    """The least of what leases took of late, times the slots in use with this one.

    A replica that was never seen is tried with one request at once; until that has ended the others are preferred.
    """

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""

        def cost(r: Replica) -> tuple[int, float]:
            slots = r.slots + demand.choices
            if r.observed is not None:
                return (1, r.observed * slots)
            return (2 if r.slots else 0, slots)

        return min(candidates, key=cost)


class RandomByThroughput:
    """By chance, in proportion to the prefill rate."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        return self._rng.choices(candidates, weights=[1.0 / r.token_seconds for r in candidates])[0]


class RoundRobin:
    """In turn, by the order of registration."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        chosen = next((r for r in candidates if r.index > self._last), candidates[0])
        self._last = chosen.index
        return chosen


class PowerOfTwo:
    """The one with the smaller share of its slots in use, of two drawn by chance."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        """One of `candidates`."""
        drawn = self._rng.sample(candidates, 2) if len(candidates) > 2 else candidates
        return min(drawn, key=lambda r: (r.slots + demand.choices) / r.info.max_num_seqs)


STRATEGIES: dict[str, Callable[[Random], Strategy]] = {
    "min_expected_latency": lambda rng: MinExpectedLatency(),
    "min_observed_latency": lambda rng: MinObservedLatency(),
    "random": RandomByThroughput,
    "round_robin": lambda rng: RoundRobin(),
    "power_of_two": PowerOfTwo,
}


def make_strategy(name: str, rng: Random) -> Strategy:
    """The strategy called `name`. Raises ConfigError for any other."""
    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name!r} is not one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](rng)
