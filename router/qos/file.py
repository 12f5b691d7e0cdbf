"""A QoS configuration from its file, JSON or YAML.

`enable_user_qos`, `user_groups` and `user_group_map` are LMDeploy's, read as its document says; `tiers` is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.qos.config import DEFAULT, TAU, Account, QosConfig, Tier
from router.qos.source import Place, Source, read_source, shown


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
