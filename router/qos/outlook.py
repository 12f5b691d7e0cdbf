"""How long a request will wait: from its position, how fast requests were released of late, and how wrong that was."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_REMEMBERED = 256  # comparisons of a tier's predicted and actual waits
_HALF_LIFE = 20.0  # releases after which an old interval counts half
_RENEW = 16  # quantiles are sorted anew after so many releases


@dataclass(frozen=True, slots=True)
class Outlook:
    """`position` requests are served up to and with this one; it waits `low` to `high` seconds, probably `middle`."""

    position: int
    low: float
    middle: float
    high: float


class Pace:
    """Seconds between two releases while requests wait."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._weight = 0.0
        self._last: float | None = None

    def seconds(self, otherwise: float = 1.0) -> float:
        """The mean of late; `otherwise` before anything was seen."""
        return self._mean if self._weight else otherwise

    def released(self, now: float, *, more: bool) -> None:
        """A request left the queue for a replica; `more`: others still wait, so that the next interval counts."""
        if self._last is not None:
            keep = 0.5 ** (1.0 / _HALF_LIFE)
            self._weight = self._weight * keep + 1.0
            self._mean += (now - self._last - self._mean) / self._weight
        self._last = now if more else None


class Errors:
    """Actual over predicted waits of one tier. Who is overtaken waits longer than its position says."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_REMEMBERED)
        self._sorted: list[float] = []
        self._fresh = 0

    def add(self, predicted: float, waited: float) -> None:
        """A request was to wait `predicted` seconds and has waited `waited`."""
        if predicted <= 0.0:
            return
        self._ratios.append(waited / predicted)
        self._fresh += 1
        if self._fresh >= _RENEW or len(self._ratios) < _RENEW:
            self._sorted, self._fresh = sorted(self._ratios), 0

    def outlook(self, position: int, predicted: float) -> Outlook:
        """For a request that is to wait `predicted` seconds by its position; the interval held 90 % of late."""
        if len(self._sorted) < 4:
            return Outlook(position, 0.0, predicted, 4.0 * predicted)
        last = len(self._sorted) - 1
        low, middle, high = (self._sorted[round(q * last)] for q in (0.05, 0.5, 0.95))
        return Outlook(position, predicted * low, predicted * middle, predicted * high)
