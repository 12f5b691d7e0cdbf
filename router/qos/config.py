"""The QoS configuration: tiers in order, users with quotas, and limits for each tier.

`enable_user_qos`, `user_groups` and `user_group_map` are LMDeploy's, read as its document says; `tiers` is ours.
A configuration is frozen: a reload makes a new one, and `Policy.replace` takes over what has been served so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.qos.source import Place, Source, read_source, shown

DEFAULT = "default"  # the id of a tier's line for users without one
TAU = 0.018  # seconds
_STRETCH = 0.3  # G1: a step may be so much longer than a tier's own, whatever its target


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _UserLine(_Part):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    quota_pct: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _TierPart(_Part):
    min_share: Annotated[float, Field(ge=0, le=0.5, allow_inf_nan=False)] = 0.0
    max_wait: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_queued: Annotated[int, Field(ge=1)] = 10_000
    max_queued_per_user: Annotated[int, Field(ge=1)] = 1_000
    itl_target: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None


class _File(_Part):
    enable_user_qos: bool = True
    user_groups: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(min_length=1, max_length=64)]
    user_group_map: dict[str, list[_UserLine]] = {}
    tiers: dict[str, _TierPart] = {}
    tau: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = TAU


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of users; `rank` 0 is served first.

    `min_share` of all useful service goes to the tier while it waits (0: strictly after the tiers above). `max_wait`:
    after so many seconds its oldest request is served before all others, one at a time (None: never). `max_queued`
    bounds its waiting requests, `max_queued_per_user` those of one user. `itl_target`: seconds to which lower tiers may
    fill a step in which it decodes or waits (None: only tau bounds them).
    """

    rank: int
    name: str
    min_share: float = 0.0
    max_wait: float | None = None
    max_queued: int = 10_000
    max_queued_per_user: int = 1_000
    itl_target: float | None = None

    def spare(self, own: float) -> float:
        """Seconds that lower tiers may add to a step that takes `own` without them, tau aside."""
        return inf if self.itl_target is None else max(self.itl_target - own, _STRETCH * own)


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
            target = f"; its steps are filled up to {1e3 * tier.itl_target:g} ms" if tier.itl_target else ""
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


def load_qos_config(path: Path) -> QosConfig:
    """The file, JSON or YAML. Raises ConfigError: a line FILE:LINE: PROBLEM for each problem."""
    return make_qos_config(read_source(path))


def make_qos_config(source: Source) -> QosConfig:
    """What `source` says. Raises ConfigError with all that is wrong in it."""
    try:
        file = _File.model_validate(source.values)
    except ValidationError as e:
        raise source.error([(d["loc"], _advice(d["loc"], d["msg"], d.get("input"))) for d in e.errors()]) from e
    problems = _contradictions(file)
    if problems:
        raise source.error(problems)
    tiers = tuple(
        Tier(rank, name, **file.tiers.get(name, _TierPart()).model_dump()) for rank, name in enumerate(file.user_groups)
    )
    accounts = tuple(
        Account(tier, line.id, line.quota_pct) for tier in tiers for line in file.user_group_map.get(tier.name, [])
    )
    return QosConfig(tiers, accounts, enabled=file.enable_user_qos, tau=file.tau)


def _advice(place: tuple[str | int, ...], message: str, found: Any) -> str:
    where = shown(".".join(map(str, place))) or "the file"
    if message == "Extra inputs are not permitted":
        return f"{where} is not a setting: remove it or correct its name"
    if message == "Field required":
        return f"{where} is missing: add it"
    value = "" if isinstance(found, dict | list) else f", found '{shown(str(found))}'"
    return f"{where}: {message[0].lower()}{message[1:]}{value}"


def _contradictions(file: _File) -> list[tuple[Place, str]]:
    """What is well-formed, but cannot be meant."""
    problems: list[tuple[Place, str]] = []
    groups = file.user_groups
    for index, name in enumerate(groups):
        if name in groups[:index]:
            problems.append((("user_groups", index), f"the tier '{shown(name)}' is listed twice: keep one"))
    for section in ("user_group_map", "tiers"):
        for name in getattr(file, section):
            if name not in groups:
                known = shown(", ".join(groups))
                text = f"'{shown(name)}' is not one of user_groups ({known}): add it there or correct it"
                problems.append(((section, name), text))
    if "tau" in file.model_fields_set and len(groups) == 1:
        problems.append((("tau",), f"tau has no effect: '{shown(groups[0])}' is the only tier: remove it"))
    if (last := file.tiers.get(groups[-1])) is not None and last.itl_target is not None:
        text = f"itl_target has no effect: nobody is below '{shown(groups[-1])}': remove it"
        problems.append((("tiers", groups[-1], "itl_target"), text))
    if (total := sum(t.min_share for t in file.tiers.values())) > 0.5:
        problems.append((("tiers",), f"min_share sums to {total:g}: floors may take at most 0.5 together"))
    home: dict[str, str] = {}
    for name, users in file.user_group_map.items():
        ids: set[str] = set()
        for index, user in enumerate(users):
            place = ("user_group_map", name, index, "id")
            if user.id in ids:
                problems.append((place, f"'{shown(user.id)}' is in {shown(name)} twice: keep one"))
            elif user.id != DEFAULT and user.id in home:
                problems.append(
                    (place, f"'{shown(user.id)}' is in {shown(home[user.id])} already: a user has one tier")
                )
            ids.add(user.id)
            home.setdefault(user.id, name)
    return problems
