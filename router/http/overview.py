"""`/me`, for everybody: who the caller is and how it stands. `/cluster`, for admins: what the operator's page shows.

Both are read from the dispatcher's last table and from its answer to one question, so that a page may ask each second.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import AskActivity, ReplicaRow, Story
from router.http.identity import Identity, require_admin

ASK_SECONDS = 2.0
SHARED_SECONDS = 0.5  # how long an answer serves other pages, too


class Places(Protocol):
    """Where ranks are."""

    def ranks(self) -> Mapping[str, Sequence[str]]:
        """Addresses of the nodes of each replica's ranks, in their order, as far as they are known; at once."""


def overview_routes(
    dispatcher: DispatcherClient, names: Callable[[Identity], Sequence[str]], places: Places | None = None
) -> APIRouter:
    """The two routes; `names` are the models that an identity may use."""
    router = APIRouter(tags=["overview"])
    shared = _Shared(dispatcher)

    @router.get("/me")
    async def me(request: Request) -> Response:
        """The caller's owner, and for each model its tier and how many of its requests wait and run."""
        identity: Identity = request.state.identity
        models = (await _ask(dispatcher, identity.owner, identity.tier)).get("models", {})
        standing = {"tier": identity.tier, "account": "", "waiting": 0, "running": 0}
        found = {name: models.get(name, standing) for name in names(identity)}
        return JSONResponse({"owner": identity.owner, "admin": identity.admin, "models": found})

    @router.get("/cluster")
    async def cluster(request: Request) -> Response:
        """Replicas, queues, who is served and why, who was done lately."""
        require_admin(request.state.identity)
        ranks = {} if places is None else places.ranks()
        return JSONResponse(
            {
                "connected": dispatcher.connected,
                "table_age": round(min(monotonic() - dispatcher.table_at, 1e9), 3),
                "replicas": [_replica(row, ranks.get(row.info.id, ())) for row in dispatcher.rows],
                "waiting": dict(dispatcher.table.waiting_by_model),
                "tiers": [asdict(row) for row in dispatcher.table.tiers],
                "work": [asdict(row) for row in dispatcher.table.work],
                "activity": await shared.activity(),
            }
        )

    return router


class _Shared:
    """What all operators' pages show, asked for once."""

    def __init__(self, dispatcher: DispatcherClient) -> None:
        self._dispatcher = dispatcher
        self._asked: asyncio.Task[dict[str, Any]] | None = None
        self._asked_at = -math.inf

    async def activity(self) -> dict[str, Any]:
        if self._asked is None or monotonic() - self._asked_at > SHARED_SECONDS:
            self._asked_at = monotonic()
            self._asked = asyncio.create_task(_ask(self._dispatcher, None))
        return await asyncio.shield(self._asked)


async def _ask(dispatcher: DispatcherClient, owner: str | None, tier: str = "") -> dict[str, Any]:
    """The dispatcher's answer; empty without a dispatcher: what is known here is shown then."""
    try:
        answer = await dispatcher.ask(lambda number: AskActivity(number, owner, tier), ASK_SECONDS)
    except ConnectionError:
        return {}
    assert isinstance(answer, Story)
    found: dict[str, Any] = json.loads(answer.body)
    return found


def _replica(row: ReplicaRow, ranks: Sequence[str]) -> dict[str, Any]:
    info, load = row.info, row.load
    return {
        "id": info.id,
        "url": info.url,
        "model": info.model,
        "state": row.state.value,
        "host": info.host,
        "pid": info.pid,
        "ranks": list(ranks),
        "running": load.running,
        "waiting": load.waiting,
        "leases": row.leases,
        "slots": row.slots,
        "max_num_seqs": info.max_num_seqs,
        "free_blocks": load.free_blocks,
        "total_blocks": load.total_blocks,
        "steps": load.step,
        "step_seconds": round(load.step_seconds, 6),
        "since_step": None if math.isinf(row.since_step) else round(row.since_step, 3),
        "executed_tokens": load.executed_tokens,
        "backlog_tokens": load.prefill_backlog,
        "backlog_seconds": round(row.backlog_seconds, 4),
        "prefill_rate": round(row.prefill_rate, 1),
        "preemptions": load.preemptions,
        "prefix_queries": load.prefix_queries,
        "prefix_hits": load.prefix_hits,
    }
