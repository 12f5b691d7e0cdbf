"""The books at the end of a run: nothing is open, and no process, thread, file or task is left over."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos.processes import census, holdings, resident
from chaos.waiting import look, until
from router.vitals import Vitals

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site

SETTLE_SECONDS = 60.0  # HAProxy keeps idle connections for a while
RSS_SLACK = 1.10, 32 << 20  # factor and bytes: a process that was started later had another load at its start
OURS = ("rank", "dispatcher", "gateway", "supervisor", "ingress")  # what Ray's and HAProxy's hold is not ours to say
FILES_SLACK = 4  # sockets of connections that come and go by themselves


@dataclass(frozen=True, slots=True)
class Baseline:
    """What stood before the first fault."""

    processes: Counter[str]
    held: dict[str, Vitals]
    tasks: int


def take_baseline(site: Site) -> Baseline:
    """Now."""
    return Baseline(census(), holdings(), site.tasks())


def grown(before: Baseline, after: Baseline) -> str:
    """What there is more of than before, or less of among processes; "" when nothing is."""
    if before.processes != after.processes:
        gone, more = before.processes - after.processes, after.processes - before.processes
        return f"processes: {dict(gone)} less, {dict(more)} more"
    if after.tasks > before.tasks:
        return f"the dispatcher has {after.tasks} tasks, had {before.tasks}"
    factor, slack = RSS_SLACK
    for role, then in before.held.items():
        if role not in OURS:
            continue
        now = after.held.get(role)
        if now is None:
            return f"{role} is gone"
        if now.files > then.files + FILES_SLACK or now.threads > then.threads + FILES_SLACK:
            return f"{role}: {then} before, {now} after"
        if now.resident_bytes > then.resident_bytes * factor + slack:
            return f"{role}: {then} before, {now} after"
    return ""


async def settle(site: Site, before: Baseline) -> list[str]:
    """What is still open or grown when all had time to settle."""
    found = ""

    def whole() -> bool:
        nonlocal found
        if len(site.ready()) < site.shape.replicas:
            found = f"only {len(site.ready())} of {site.shape.replicas} replicas are ready"
        else:
            found = site.unsettled() or grown(before, take_baseline(site))
        return not found

    return [] if await until(whole, SETTLE_SECONDS, every=0.5) is not None else [found]


async def sample_memory(samples: list[dict[str, float]], every: float) -> None:
    """Resident bytes by role, again and again, until cancelled."""
    began = time.monotonic()
    while True:
        samples.append({"seconds": round(time.monotonic() - began, 1), **await look(resident)})
        await asyncio.sleep(every)
