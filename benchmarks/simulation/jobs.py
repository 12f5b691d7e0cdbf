"""`Job`: one request of a simulation, what it asks and what became of it; virtual seconds and tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from workers.api.request import EngineRequest, SamplingParams

PREFIXES = 1 << 30  # token ids from here on are those of shared prefixes


@dataclass(slots=True, eq=False)
class Job:
    """`prefix_tokens` of the prompt are those of all jobs with the same `prefix`; the rest is its own."""

    number: int
    user: str
    prompt: int
    output: int
    arrived: float = 0.0
    tier: str = ""
    prefix: int = 0
    prefix_tokens: int = 0

    replica: str = ""
    granted: float | None = None
    predicted: float = math.nan  # seconds to its first token, as the dispatcher saw it at the grant
    first: float | None = None  # its first token
    last: float | None = None
    ended: float | None = None  # finished, aborted or refused
    refused: bool = False
    emitted: int = 0
    gaps: list[float] = field(default_factory=list)
    reached: int = 0  # positions executed or found in the cache
    cached: int = 0
    residencies: int = 0

    @property
    def name(self) -> str:
        """The id of its request."""
        return f"j{self.number}"

    @property
    def ttft(self) -> float:
        """Seconds to the first token; infinite if none came."""
        return math.inf if self.first is None else self.first - self.arrived

    @property
    def done(self) -> bool:
        """Whether all of its tokens came."""
        return self.emitted >= self.output

    def tokens(self) -> tuple[int, ...]:
        """Its prompt: blocks are alike where, and only where, prefixes are."""
        return (PREFIXES + self.prefix,) * self.prefix_tokens + (self.number,) * (self.prompt - self.prefix_tokens)

    def request(self) -> EngineRequest:
        """What the engine is asked."""
        sampling = SamplingParams(max_tokens=self.output, seed=self.number)
        return EngineRequest(self.name, self.tokens(), sampling, owner=self.user, tier=self.tier)

    def emit(self, tokens: int, now: float) -> None:
        """So many more tokens came."""
        self.emitted += tokens
        if self.first is None:
            self.first = now
        elif self.last is not None:
            self.gaps.append((now - self.last) / tokens)
        self.last = now


class Maker:
    """Makes jobs whose numbers grow."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(
        self,
        user: str,
        prompt: int,
        output: int,
        *,
        n: int = 1,
        at: float = 0.0,
        every: float = 0.0,
        prefix: int = 0,
        prefix_tokens: int = 0,
    ) -> list[Job]:
        """`n` alike, `every` so many seconds."""
        first = self.count
        self.count += n
        return [
            Job(first + i, user, prompt, output, at + i * every, prefix=prefix, prefix_tokens=prefix_tokens)
            for i in range(n)
        ]


def again(jobs: Iterable[Job]) -> list[Job]:
    """The same work, not yet done."""
    return [
        Job(j.number, j.user, j.prompt, j.output, j.arrived, j.tier, j.prefix, j.prefix_tokens)
        for j in sorted(jobs, key=lambda j: (j.arrived, j.number))
    ]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie; linear between neighbours. NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:
        return ordered[low]
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
