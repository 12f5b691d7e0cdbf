"""The QoS configuration: tiers in order, users with quotas, and limits for each tier.

A configuration is frozen: a reload makes a new one, and `Policy.replace` takes over what has been served so far. How it
is read from a file: `router.qos.file`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

DEFAULT = "default"  # the id of a tier's line for users without one
TAU = 0.018  # seconds
_STRETCH = 0.3  # G1: a step may be so much longer than a tier's own, whatever its target
_SLACK = 0.1  # of a target: what predictions are off by must not miss it


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of users; `rank` 0 is served first.

    `min_share` of all useful service goes to the tier while it waits (0: strictly after the tiers above). `max_wait`:
    after so many seconds its oldest request is served before all others, one at a time (None: never). `max_queued`
    bounds its waiting requests, `max_queued_per_user` those of one user. `itl_target`: seconds that a step in which it
    decodes or waits should not exceed for what lower tiers do (None: only tau bounds them).
    """

    rank: int
    name: str
    min_share: float = 0.0
    max_wait: float | None = None
    max_queued: int = 10_000
    max_queued_per_user: int = 1_000
    itl_target: float | None = None

    @property
    def filled(self) -> float:
        """Predicted seconds up to which lower tiers may fill a step, tau aside."""
        return inf if self.itl_target is None else (1.0 - _SLACK) * self.itl_target

    def spare(self, own: float) -> float:
        """Seconds that lower tiers may add to a step that takes `own` without them, tau aside."""
        return max(self.filled - own, _STRETCH * own)


@dataclass(frozen=True, slots=True)
class Account:
    """A line of the configuration: what shares are measured on. Users without a line share their tier's `default`."""

    tier: Tier
    id: str
    quota: float  # a weight among the tier's accounts; 0: only what the others leave

    @property
    def key(self) -> tuple[str, str]:
        """Tier and id: unique."""
        return (self.tier.name, self.id)


class QosConfig:
    """Who is served in which order. `enabled` False: first come, first served, with the limits of no tier.

    `tau`: predicted seconds that all lower tiers together may add to a step in which a higher one decodes or waits.
    """

    def __init__(
        self, tiers: tuple[Tier, ...], accounts: tuple[Account, ...], *, enabled: bool = True, tau: float = TAU
    ) -> None:
        self.enabled, self.tiers, self.accounts, self.tau = enabled, tiers, accounts, tau
        self._users = {a.id: a for a in accounts if a.id != DEFAULT}
        self._defaults = {a.tier.name: a for a in accounts if a.id == DEFAULT}
        listed = [a for a in accounts if a.id == DEFAULT]
        self._unlisted = max(listed, key=lambda a: a.tier.rank) if listed else Account(tiers[-1], DEFAULT, 0.0)
        for tier in tiers:
            self._defaults.setdefault(tier.name, Account(tier, DEFAULT, 0.0))
        self._by_key = {a.key: a for a in (*self._defaults.values(), *accounts)}

    def by_key(self, key: tuple[str, str]) -> Account | None:
        """The account with this key, if there is one."""
        return self._by_key.get(key)

    def account(self, user: str, tier: str = "") -> Account:
        """Where `user` is charged: its own line; else the default of `tier`, which its API key names; else the last
        tier that lists a default (the last of all, with quota 0, if none does). The user "default" has no own line.
        """
        return self._users.get(user) or self._defaults.get(tier) or self._unlisted

    def explain(self) -> list[str]:
        """In words, with the share that each account gets while all of its tier wait."""
        if not self.enabled:
            return ["enable_user_qos is false: first come, first served"]
        lines: list[str] = []
        if len(self.tiers) > 1:
            lines.append(f"lower tiers add at most {1e3 * self.tau:g} ms to a step in which a higher one has work")
        for tier in self.tiers:
            above = "first" if tier.rank == 0 else f"after {self.tiers[tier.rank - 1].name}"
            floor = f"; at least {tier.min_share:.1%} of all service while it waits" if tier.min_share else ""
            wait = f"; its oldest request first after {tier.max_wait:g} s" if tier.max_wait else ""
            target = f"; its steps are filled up to {1e3 * tier.filled:g} ms" if tier.itl_target else ""
            lines.append(
                f"{tier.name}: {above}{floor}{wait}{target}; at most {tier.max_queued} requests wait, "
                f"{tier.max_queued_per_user} of one user"
            )
            own = [a for a in self.accounts if a.tier is tier]
            total = sum(a.quota for a in own)
            for a in own:
                share = f"{a.quota / total:.1%}" if a.quota else ("what the others leave" if total else "equal shares")
                who = "users without a line, together" if a.id == DEFAULT else a.id
                lines.append(f"  {who}: {share}{' (all unlisted users)' if a is self._unlisted else ''}")
        return lines
