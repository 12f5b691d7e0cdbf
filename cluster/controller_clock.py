"""Serve's controller is started again when its wall clock has gone back.

Ray Serve 2.60 times its health checks, of replicas and proxies, by `time.time()`: after a clock that was ahead and is
put right, it looks after nothing until the old time is reached, and what dies meanwhile is not replaced. Ray brings a
controller that was ended back within a fraction of a second, with its state, and requests do not need it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

LOOK_SECONDS = 2.0
ANSWER_SECONDS = 10.0
MOST_BACK = 2.0  # seconds: health checks that come so much later harm nobody

log = logging.getLogger("echelon.dispatcher")


class Stepping:
    """Notices that a wall clock, read from afar, has gone back against our monotonic one."""

    def __init__(self) -> None:
        self._ahead = -math.inf  # of our clock, at least, so far

    def back(self, asked: float, wall: float, answered: float) -> float:
        """Seconds by which the clock has gone back since the last call, at least; 0 for what is not worth a word.

        It said `wall` at some moment between `asked` and `answered` on our clock.
        """
        back = self._ahead - (wall - asked)
        if back > MOST_BACK:
            self._ahead = wall - answered
            return back
        self._ahead = max(self._ahead, wall - answered)
        return 0.0


async def keep_controller_in_time() -> None:
    """Never returns; waits for Serve where it has not started."""
    stepping = Stepping()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            asked = time.monotonic()
            said: dict[str, Any] = await asyncio.wait_for(controller.get_health_metrics.remote(), ANSWER_SECONDS)
        except (ValueError, TimeoutError, ray.exceptions.RayError):  # it is not there, or starts again
            continue
        if back := stepping.back(asked, said["timestamp"], time.monotonic()):
            log.warning("the clock of Serve's controller has gone back by %.0f s: it is started again", back)
            ray.kill(controller, no_restart=False)
