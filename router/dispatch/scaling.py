"""How many replicas a model should have: pure, with the clock as an argument.

Up as soon as a new request is expected to wait too long, down only when the rest would be at ease. Between both lie a
gap and two delays, so that the count does not swing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.api.errors import ConfigError

_START_SECONDS = 120.0  # a replica that is not up so long after a change does not come: there is no room for it
_MOST_GROWTH = 2.0  # times the replicas that there are, in one step


@dataclass(frozen=True, slots=True)
class FleetLoad:
    """All replicas of one model that take leases. `busy` is the share of their slots, or blocks, that leases hold."""

    ready: int = 0
    waiting: int = 0  # requests without a lease
    wait_seconds: float = 0.0  # that one more request is expected to wait before its prompt is computed
    busy: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """Bounds and aims; times in seconds. Raises ConfigError when they contradict each other."""

    min_replicas: int
    max_replicas: int
    target_wait: float = 1.0  # expected for longer than `up_after`, more replicas are started
    target_busy: float = 0.7  # a replica is taken away only if the others would not be busier than this
    up_after: float = 5.0
    down_after: float = 60.0
    cooldown: float = 60.0  # after any change, until a replica is taken away

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"autoscaling needs 1 <= min_replicas <= max_replicas, got {self.min_replicas} and {self.max_replicas}"
            )


class Scaler:
    """Remembers since when there are too few or too many, and when it last changed its mind."""

    def __init__(self, config: ScalingConfig) -> None:
        self.config = config
        self._short_since: float | None = None
        self._idle_since: float | None = None
        self._changed_at = float("-inf")
        self._last: int | None = None

    def decide(self, now: float, wanted: int, load: FleetLoad | None) -> int:
        """The replicas that there should be, from `wanted` of now. `load` None: not known, nothing changes."""
        config = self.config
        bounded = min(max(wanted, config.min_replicas), config.max_replicas)
        if self._last is not None and wanted != self._last:  # another's decision: an operator's, or a new file's
            self._changed_at = now
        self._last = bounded
        if bounded != wanted or load is None:
            self._short_since = self._idle_since = None
            return bounded
        self._short_since = _since(self._short_since, now, on=self._is_short(wanted, load))
        starts = load.ready < wanted and now - self._changed_at < _START_SECONDS
        self._idle_since = _since(self._idle_since, now, on=not starts and self._is_idle(wanted, load))
        if self._short_since is not None and now - self._short_since >= config.up_after:
            growth = min(load.wait_seconds / config.target_wait, _MOST_GROWTH)
            return self._change(now, max(wanted + 1, math.ceil(wanted * growth)))
        if self._idle_since is not None:
            long_enough = now - self._idle_since >= config.down_after
            if long_enough and now - self._changed_at >= config.cooldown:
                return self._change(now, wanted - 1)
        return wanted

    def _is_short(self, wanted: int, load: FleetLoad) -> bool:
        """Those that were asked for are up, and still a new request would wait for too long."""
        can_grow = load.ready >= wanted < self.config.max_replicas
        return can_grow and load.wait_seconds > self.config.target_wait

    def _is_idle(self, wanted: int, load: FleetLoad) -> bool:
        """The others would be at ease with all that is there."""
        if wanted <= self.config.min_replicas or load.waiting or load.wait_seconds > self.config.target_wait / 2:
            return False
        return load.busy * load.ready <= self.config.target_busy * (wanted - 1)

    def _change(self, now: float, wanted: int) -> int:
        self._short_since = self._idle_since = None
        self._changed_at = now
        self._last = min(max(wanted, self.config.min_replicas), self.config.max_replicas)
        return self._last


def _since(before: float | None, now: float, *, on: bool) -> float | None:
    if not on:
        return None
    return now if before is None else before
