"""How long a step has really taken: time in which the machine gave the rank no processor is not the rank's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Delays = dict[str, float]  # by thread: seconds that it was ready to run and did not


def delays_of(pid: int) -> Delays:
    """Of a process of this machine, by Linux' schedstat; empty where there is none, or the kernel keeps no numbers."""
    delays: Delays = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            _, waited, _ = stat.read_text("ascii").split()
        except (OSError, ValueError):  # the thread has ended
            continue
        delays[stat.parent.name] = int(waited) * 1e-9
    return delays


def own_delays() -> Delays:
    """Of this process."""
    return delays_of(os.getpid())


def most_waited(then: Delays, now: Delays) -> float:
    """Seconds that the most starved thread has waited from `then` to `now`."""
    return max((seconds - then.get(thread, 0.0) for thread, seconds in now.items()), default=0.0)


class StepWatch:
    """The age of the step under way, without what its most starved thread waited since the step was first asked for."""

    def __init__(self, delays: Callable[[], Delays] = own_delays) -> None:
        self._delays = delays
        self._last_age = 0.0
        self._then: Delays | None = None  # when the step was first seen

    def age(self, wall: float) -> float:
        """`wall` is its age by the clock, in seconds; 0 between steps. To be asked again and again."""
        if wall <= 0.0:
            self._then = None
        elif self._then is None or wall < self._last_age:  # another step than last time
            self._then = self._delays()
        self._last_age = wall
        if self._then is None:
            return wall
        return max(wall - most_waited(self._then, self._delays()), 0.0)
