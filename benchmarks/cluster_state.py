"""How a running cluster is inside, for checks after load: its books, and what its processes hold.

For clusters of one machine. Import only after `cluster.environment.prepare_ray`.
"""

from __future__ import annotations

import urllib.request
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families

from cluster.names import DISPATCHER, NAMESPACE
from router.vitals import Vitals, vitals_of

RSS_SLACK = 1.05, 8 << 20  # factor and bytes: allocators keep what they had at their peak


def dispatcher() -> Any:
    """Its actor."""
    return ray.get_actor(DISPATCHER, namespace=NAMESPACE)


def ready_rows() -> list[Any]:
    """Rows of the replicas that take leases."""
    return [r for r in ray.get(dispatcher().status.remote(), timeout=30).rows if r.state == "ready"]


def unsettled() -> str:
    """What is still open in the books; "" when leases, requests and blocks all balance and nothing runs."""
    ledger = ray.get(dispatcher().ledger.remote(), timeout=30)
    if not ledger.balanced or ledger.held:
        return f"leases: {ledger}"
    for row in ready_rows():
        load = row.load
        idle = row.leases == 0 and load.requests.running == 0 and load.free_blocks == load.total_blocks
        if not idle or not load.requests.balanced:
            return f"replica {row.info.id}: {row.leases} leases, {load}"
    return ""


def _counts(base_url: str) -> dict[str, dict[str, int]]:
    """By front: `tasks` of its event loop and `requests`, whose answers are under way, as /metrics has them."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=30) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    counts: dict[str, dict[str, int]] = {}
    for family in families:
        name = family.name.removeprefix("echelon_front_")
        for sample in family.samples if family.name in ("echelon_front_tasks", "echelon_front_requests") else ():
            front = counts.setdefault(sample.labels["front"], {"tasks": 0, "requests": 0})
            front[name] += int(sample.value)
    return counts


def vitals(base_url: str) -> dict[str, Vitals]:
    """Of the ingresses, the dispatcher and rank 0 of every replica (whose tasks are not counted)."""
    counts = _counts(base_url)
    found = {"dispatcher": ray.get(dispatcher().vitals.remote(), timeout=30)}
    for name in ray.get(dispatcher().clients.remote(), timeout=30):
        kind, pid, _ = name.split("-", 2)
        if kind == "ingress":
            found[f"ingress {pid}"] = vitals_of(int(pid), counts[name]["tasks"], counts[name]["requests"])
    for row in ready_rows():
        found[f"rank of {row.info.id}"] = vitals_of(row.info.pid)
    return found


def grown(before: dict[str, Vitals], after: dict[str, Vitals]) -> str:
    """Which process holds more than before; "" when none does."""
    factor, slack = RSS_SLACK
    for name, then in before.items():
        now = after.get(name)
        if now is None:
            return f"{name} is gone"
        counts = now.tasks > then.tasks or now.threads > then.threads or now.files > then.files
        counts |= now.answers > then.answers
        if counts or now.resident_bytes > then.resident_bytes * factor + slack:
            return f"{name}: {then} before, {now} after"
    return ""
