"""POST /v1/chat/interactive and /v1/chat/interactive_qos: rounds of sessions, and their cancelling."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.http.exchange import Exchange
from router.http.identity import Identity
from router.http.job import Job
from router.http.once import Once, key_of
from router.http.schema import body_of
from router.protocol.interactive import InteractiveBody, InteractiveQosBody
from router.service import Service
from workers.api.errors import EchelonError


def interactive_routes(
    service: Service, once: Once | None, own: Callable[[Job], Exchange], read: Callable[[Request], Awaitable[bytes]]
) -> APIRouter:
    """The routes. `own` answers a job, `read` gives a request's body; without `once` idempotency keys are ignored."""
    router = APIRouter()

    async def answer(request: Request, route: str) -> Response:
        owner: Identity = request.state.identity
        body = await read(request)
        key = None if once is None else key_of(request.headers, owner.owner, route)
        asked = await service.checked(route, body, owner)
        assert isinstance(asked, InteractiveBody)
        if asked.cancel:
            return Response(await service.cancel(asked, owner), media_type="application/json")
        if once is None or key is None:
            return own(await service.job_of(route, asked, owner))
        # The key comes first: a retry of a round that runs, or has run, is none of its own.
        try:
            kept = await once.claim(key, body, stream=bool(asked.stream))
        except EchelonError as e:
            service.count_refusal(route, owner, e)
            raise
        if kept is not None:
            service.count_kept(route, owner)
            return kept
        try:
            job = await service.job_of(route, asked, owner)
        except BaseException:
            once.give_up(key, body)
            raise
        return once.first(key, body, own(job), stream=job.stream)

    @router.post("/v1/chat/interactive", openapi_extra=body_of(InteractiveBody), tags=["lmdeploy"])
    async def chat_interactive(request: Request) -> Response:
        """A chat's answer as LMDeploy documents it, as one body or as lines of JSON; sessions' histories are kept."""
        return await answer(request, "/v1/chat/interactive")

    @router.post("/v1/chat/interactive_qos", openapi_extra=body_of(InteractiveQosBody), tags=["qos"])
    async def chat_interactive_qos(request: Request) -> Response:
        """The same for a user of the caller's: `user_id`."""
        return await answer(request, "/v1/chat/interactive_qos")

    return router
