"""How long a step has really taken: time in which the machine gave the rank no processor is not the rank's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Delays = dict[str, float]  # by thread: seconds that it was ready to run and did not


def own_delays() -> Delays:
    """Of this process, by Linux' schedstat; empty where the kernel keeps none."""
    delays: Delays = {}
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        try:
            _, waited, _ = (task / "schedstat").read_text("ascii").split()
        except (OSError, ValueError):  # the thread has ended, or there are no such numbers
            continue
        delays[task.name] = int(waited) * 1e-9
    return delays


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
        waited = max((now - self._then.get(thread, 0.0) for thread, now in self._delays().items()), default=0.0)
        return max(wall - waited, 0.0)
