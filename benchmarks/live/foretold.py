"""A wait that was foretold, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foretold:
    """Seconds, from when it was told: at least, probably, at most; and what came of it."""

    low: float
    middle: float
    high: float
    lease: float
    first: float

    def covers(self, waited: float) -> bool:
        """Whether the interval held."""
        return self.low <= waited <= self.high

    def close(self, waited: float) -> bool:
        """Whether the middle was within a second or 30 %."""
        return abs(self.middle - waited) <= max(1.0, 0.3 * waited)
