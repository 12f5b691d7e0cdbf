"""Floors: the share of service that a tier gets whatever the tiers above it want, where it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from router.qos.config import Tier


class Floors:
    """What each tier with a `min_share` is owed, in units.

    A tier is owed its share of all useful service while it has work, less what it got. Neither debt nor credit grows
    beyond `bound`: a tier that cannot use its share does not save it up.
    """

    def __init__(self, tiers: Iterable[Tier], bound: float, before: Floors | None = None) -> None:
        self._bound = bound
        self._shares = {t.name: t.min_share for t in tiers if t.min_share}
        self._owed: dict[str, float] = dict.fromkeys(self._shares, 0.0)
        if before is not None:
            self._owed.update({n: owed for n, owed in before._owed.items() if n in self._shares})

    @property
    def any(self) -> bool:
        """Whether some tier has a floor."""
        return bool(self._shares)

    def served(self, units: Mapping[str, float], active: Iterable[str]) -> None:
        """A step served each tier so many units, while the tiers `active` had work."""
        if not self._shares:
            return
        total, busy = sum(units.values()), set(active) | set(units)
        for name, share in self._shares.items():
            if name in busy:
                owed = self._owed[name] + share * total - units.get(name, 0.0)
                self._owed[name] = min(max(owed, -self._bound), self._bound)
            else:
                self._owed[name] = 0.0

    def owed(self, tier: str) -> float:
        """Units that `tier` is owed now; 0 if none, or if it has no floor."""
        return max(self._owed.get(tier, 0.0), 0.0)
