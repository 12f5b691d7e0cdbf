"""G7: who has a key of the lowest tier tries to be served as another one, in every way that HTTP has.

A try is an escalation when its request counted for another owner, tier or account than the key's, when it showed what
belongs to another one, or did what is for admins. What the dispatcher recorded decides (`/requests/ID/explain`, asked
with an admin's key), and at the end the counters of the tiers above, which nothing may have moved.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from live.cluster import running, write_keys, write_tiers
from live.figures import Figure, single
from live.lies import ROUTES, Try, credentials, others, requests
from live.site import Answer, Site

TIERS = {"Platinum": {"vip": 100.0}, "Gold": {"anna": 60.0, "rich": 40.0}, "Bronze": {"ben": 50.0, "default": 50.0}}


@dataclass
class Tally:
    """`escalations` in words."""

    tries: int = 0
    served: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    escalations: list[str] = field(default_factory=list)


async def suite(site: Site, keys: dict[str, str]) -> Tally:
    """All of it, one after the other. Raises RuntimeError where the suite itself does not work."""
    tally, secret = Tally(), [1 + n % 200 for n in range(300, 700)]
    vip_id = "vip-request-0123456789abcdef"
    said = {"model": "demo", "prompt": secret, "max_tokens": 4, "seed": 1}
    mine = [("x-request-id", vip_id), ("idempotency-key", "the-vips")]
    first = await site.call(ROUTES[0], said, mine, user="vip")
    if first.status != 200:
        raise RuntimeError(f"the vip is refused: {first.body!r}")
    before = await _counted(site)
    for number, one in enumerate(requests()):
        await _judge(site, one, f"spoof-{number}", tally)
    for one in (*credentials(keys), *others(vip_id)):
        await _judge(site, one, "", tally)
    await _borrow(site, said, vip_id, first, tally)
    moved = {k: v for k, v in (await _counted(site)).items() if v != before.get(k, 0.0)}
    tally.escalations += [f"counter {name} moved" for name in moved]
    return tally


async def _judge(site: Site, one: Try, name: str, tally: Tally) -> None:
    headers = [*one.headers, *([("x-request-id", name)] if name else [])]
    answer = await site.call(one.path, one.data, headers, user="ben" if one.keyed else "", method=one.method)
    _count(tally, answer)
    if answer.status >= 300:
        return
    if not name:
        tally.escalations.append(f"{one.what}: {answer.status} {answer.body[:80]!r}")
        return
    await _whose(site, name, one.what, tally)


async def _whose(site: Site, name: str, what: str, tally: Tally) -> None:
    """Whom the dispatcher counted the request called `name` for."""
    story = (await site.call(f"/requests/{name}/explain", user="root")).json()
    if (story["owner"], story["tier"], story["account"]) != ("ben", "Bronze", "ben"):
        tally.escalations.append(f"{what}: {story['owner']}, {story['tier']}, {story['account']}")


async def _borrow(site: Site, said: dict[str, Any], vip_id: str, first: Answer, tally: Tally) -> None:
    """Under the vip's request id, with its idempotency key, with its prompt: nothing of it may come back."""
    salted: set[str] = set()
    for salt in ("", "vip"):
        for headers in ([("x-request-id", vip_id)], [("idempotency-key", "the-vips")], []):
            answer = await site.call(ROUTES[0], {**said, **({"cache_salt": salt} if salt else {})}, headers, user="ben")
            _count(tally, answer)
            if answer.status >= 300:
                continue
            cached = (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            if answer.json()["id"] == first.json()["id"] or (cached and salt not in salted):
                tally.escalations.append(f"the vip's answer, or its cache: salt {salt!r}, {headers}")
            salted.add(salt)  # from now on the impostor has cached it itself
    story = (await site.call(f"/requests/{vip_id}/explain", user="vip")).json()
    if (story["owner"], story["tier"]) != ("vip", "Platinum"):
        tally.escalations.append(f"the vip's request became {story['owner']}'s")


def _count(tally: Tally, answer: Answer) -> None:
    tally.tries += 1
    tally.served += answer.status < 300
    tally.statuses[answer.status] = tally.statuses.get(answer.status, 0) + 1


async def _counted(site: Site) -> dict[str, float]:
    """What the tiers above were served, by the counters' own names."""
    page = (await site.call("/metrics", user="root")).body.decode()
    lines = re.findall(r'^(echelon_(?:requests|user_tokens)_total\{.*tier="(?:Platinum|Gold)".*\}) (\S+)$', page, re.M)
    return {name: float(value) for name, value in lines}


def measure() -> list[Figure]:
    """On a cluster with API keys."""
    with tempfile.TemporaryDirectory() as folder:
        file, held = Path(folder) / "qos.json", Path(folder) / "keys.yaml"
        keys = write_keys(held, [("vip", "Platinum"), ("ben", "Bronze"), ("root", "Bronze")], admins=["root"])
        with running(qos=write_tiers(file, TIERS), keys=held) as cluster:
            tally = asyncio.run(suite(Site(cluster.base_url, keys), keys))
    for escalation in tally.escalations:
        print(f"G7 ESCALATION {escalation}", flush=True)
    print(f"G7 statuses: {dict(sorted(tally.statuses.items()))}", flush=True)
    return [
        single("tries", tally.tries),
        single("tries that were served, as what they are", tally.served),
        single("escalations", len(tally.escalations), bound=0),
    ]
