"""How long a request will wait: from its position, how fast requests were released of late, and how wrong that was."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_REMEMBERED = 256  # comparisons of a tier's predicted and actual waits
_NEAR = 64  # of them are asked
_UNLIKE = 1.25  # times: who comes next may wait so much less, or longer, than the last ones like it
_HALF_LIFE = 20.0  # releases after which an old interval counts half


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
    """Actual over predicted waits of one tier. Who is overtaken waits longer than its position says.

    A prediction is judged by those that were most like it: what was learned of long queues says little of short ones.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)  # (predicted, actual / predicted)

    def add(self, predicted: float, waited: float) -> None:
        """A request was to wait `predicted` seconds and has waited `waited`."""
        if predicted > 0.0:
            self._seen.append((predicted, waited / predicted))

    def outlook(self, position: int, predicted: float) -> Outlook:
        """For one that is to wait `predicted` seconds by its position; the interval holds 90 % of those like it."""
        if len(self._seen) < 4 or predicted <= 0.0:
            return Outlook(position, 0.0, predicted, 4.0 * predicted)
        latest_first = list(reversed(self._seen))  # which are taken where several are as like
        unlike = [seen / predicted if seen > predicted else predicted / seen for seen, _ in latest_first]
        near = sorted(range(len(unlike)), key=unlike.__getitem__)[:_NEAR]
        ratios = sorted([latest_first[n][1] for n in near])
        last = len(ratios) - 1
        low, middle, high = (ratios[round(q * last)] for q in (0.05, 0.5, 0.95))
        return Outlook(position, predicted * low / _UNLIKE, predicted * middle, predicted * high * _UNLIKE)
