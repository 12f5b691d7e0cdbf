"""`create_app`: the HTTP surface as a plain FastAPI application. Ray Serve ingests it; tests call it in process."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.dispatch.client import DispatcherClient
from router.engine_metrics import EngineMetrics
from router.generation import Generator
from router.http.anthropic import AnthropicWays
from router.http.config import FrontConfig, ServedModel
from router.http.entry import read_body
from router.http.exchange import Exchange
from router.http.gate import OPEN_PATHS, Gate, error_response
from router.http.identity import Identity, IdentityResolver, NoKeys
from router.http.interactive import interactive_routes
from router.http.job import Job
from router.http.nodes import node_routes
from router.http.once import Answers, Once, key_of
from router.http.outlet import Turn
from router.http.overview import Places, overview_routes
from router.http.relay import Relay
from router.http.rounds import Histories
from router.http.schema import ERRORS, answer_of, anthropic_answer_of, body_of
from router.http.status import Status
from router.http.stories import Stories
from router.http.straight import note_server
from router.http.token_routes import token_routes
from router.metrics import CONTENT_TYPE, Metrics
from router.protocol.answer_schemas import (
    ChatAnswer,
    CompletionAnswer,
    MessageAnswer,
    ModelCard,
    ModelList,
    ResponseAnswer,
)
from router.protocol.errors import HttpRefusal, echo
from router.protocol.generate import GenerateBody
from router.protocol.messages import MessagesBody
from router.protocol.openai import ChatBody, CompletionBody
from router.protocol.qos_bodies import QosChatBody, QosCompletionBody
from router.protocol.responses import ResponsesBody
from router.service import Service
from router.web.assets import asset_routes, read_assets
from workers.api.errors import EchelonError


class Front(FastAPI):
    """FastAPI puts layers of its own around all that it is given: the server's `send` must be noted before them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's scope."""
        note_server(scope, send)
        await super().__call__(scope, receive, send)


def create_app(
    config: FrontConfig,
    models: Sequence[ServedModel],
    generator: Generator,
    status: Status,
    *,
    identity: IdentityResolver | None = None,
    metrics: Metrics | None = None,
    page: Callable[[], Awaitable[bytes]] | None = None,
    answers: Answers | None = None,
    stories: Stories | None = None,
    histories: Histories | None = None,
    nodes: DispatcherClient | None = None,
    places: Places | None = None,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """The application. `identity` None = no keys, loopback only; `draw_seed` seeds requests that bring none.

    `page` gives what /metrics shows; None = the numbers of this front and of the engines. `answers` keeps those of
    requests with an idempotency key; None = the header is ignored. `stories` remembers what became of
    requests. `histories` keeps interactive sessions; None = this process does. `nodes` gives the /nodes routes, the
    models of foreign nodes, /me and /cluster; None = there are none. `places` tells /cluster where ranks are.
    Errors have OpenAI's body and every answer an `x-request-id`. Raises ConfigError when two models share a name.
    """
    service = Service(
        models,
        generator,
        config=config,
        draw_seed=draw_seed,
        now=now,
        metrics=metrics,
        stories=stories,
        histories=histories,
    )
    once = None if answers is None else Once(answers)
    turn = Turn()
    read = functools.partial(read_body, config=config)
    show = page or functools.partial(local_page, service.metrics, EngineMetrics(status))

    def own(job: Job) -> Exchange:
        return Exchange(job, job.by(generator), service.meter(job), service.ended, turn, config.stalled_seconds)

    relay = None if nodes is None else Relay(nodes, service, own)
    if relay is not None:
        service.foreign = relay.models

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if once is not None:
            await once.close()
        service.close()

    started = int(now())
    pages = read_assets() if config.pages else {}
    app = Front(
        title="Echelon",
        version=config.version,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        responses=ERRORS,
        generate_unique_id_function=lambda route: route.name,  # what generated clients call it
    )
    app.add_middleware(
        Gate,
        resolver=identity or NoKeys(origins=() if config.cors is None else config.cors.allow_origins),
        edge_secret=config.edge_secret,
        count=service.metrics.refused,
        open_paths=OPEN_PATHS | pages.keys(),
    )
    app.add_middleware(AnthropicWays)
    if config.cors is not None:  # around the gate: a browser asks without a key whether it may ask with one
        app.add_middleware(CORSMiddleware, **asdict(config.cors))
    app.add_exception_handler(EchelonError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)

    async def generate(request: Request, route: str) -> Response:
        owner: Identity = request.state.identity
        body = await read(request)
        key = None if once is None else key_of(request.headers, owner.owner, route)
        if relay is not None and key is None:
            relayed = await relay.take(route, body, owner)
            if relayed is not None:
                return relayed
        job = await service.job(route, body, owner)

        if once is not None and key is not None:
            try:
                kept = await once.claim(key, body, stream=job.stream)
            except EchelonError as e:
                service.count_refusal(route, owner, e)
                raise
            if kept is not None:
                service.count_kept(route, owner)
                return kept
        exchange = own(job)
        if once is None or key is None:
            return exchange
        return once.first(key, body, exchange, stream=job.stream)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatBody), responses=answer_of(ChatAnswer), tags=["openai"])
    async def chat_completions(request: Request) -> Response:
        """A chat's answer, as one body or as a stream of events."""
        return await generate(request, "/v1/chat/completions")

    @app.post(
        "/v1/completions",
        openapi_extra=body_of(CompletionBody),
        responses=answer_of(CompletionAnswer),
        tags=["openai"],
    )
    async def completions(request: Request) -> Response:
        """The continuation of one or more prompts, as one body or as a stream of events."""
        return await generate(request, "/v1/completions")

    @app.post("/v1/chat/completions_qos", openapi_extra=body_of(QosChatBody), tags=["qos"])
    async def chat_completions_qos(request: Request) -> Response:
        """The same for a user of the caller's: `user_id`."""
        return await generate(request, "/v1/chat/completions_qos")

    @app.post("/v1/completions_qos", openapi_extra=body_of(QosCompletionBody), tags=["qos"])
    async def completions_qos(request: Request) -> Response:
        """The same for a user of the caller's: `user_id`."""
        return await generate(request, "/v1/completions_qos")

    @app.post("/generate", openapi_extra=body_of(GenerateBody), tags=["lmdeploy"])
    async def generate_text(request: Request) -> Response:
        """The continuation of text or of token ids, as LMDeploy documents it, as one body or as a stream of events."""
        return await generate(request, "/generate")

    @app.post(
        "/v1/responses", openapi_extra=body_of(ResponsesBody), responses=answer_of(ResponseAnswer), tags=["openai"]
    )
    async def responses(request: Request) -> Response:
        """An answer as OpenAI's Responses API gives it, as one body or as a stream of events. Nothing is stored."""
        return await generate(request, "/v1/responses")

    @app.post(
        "/v1/messages",
        openapi_extra=body_of(MessagesBody),
        responses=anthropic_answer_of(MessageAnswer),
        tags=["anthropic"],
    )
    async def messages(request: Request) -> Response:
        """An answer as Anthropic's Messages API gives it, as one body or as a stream of events."""
        return await generate(request, "/v1/messages")

    app.include_router(token_routes(service, functools.partial(read_body, config=config), config.version))

    @app.get("/v1/models", responses=answer_of(ModelList), tags=["openai"])
    async def list_models(request: Request) -> Response:
        """The models that the caller may use."""
        identity = request.state.identity
        cards = [_card(m) for m in service.models(identity)]
        for name in service.names(identity)[len(cards) :]:
            cards.append({"id": name, "object": "model", "created": started, "owned_by": "node"})
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model:path}", responses=answer_of(ModelCard), tags=["openai"])
    async def show_model(request: Request, model: str) -> Response:
        """One model."""
        return JSONResponse(_card(service.model(model, request.state.identity)))

    async def story_of(request: Request, request_id: str) -> dict[str, Any]:
        identity: Identity = request.state.identity
        body = b"" if stories is None else await stories.story(None if identity.admin else identity.owner, request_id)
        if not body:
            raise HttpRefusal(404, f"Nothing is known of a request '{echo(request_id)}'.", code="request_not_found")
        story: dict[str, Any] = json.loads(body)
        return story

    @app.get("/requests/{request_id:path}/explain", tags=["qos"])
    async def explain(request: Request, request_id: str) -> Response:
        """Where a request of the caller's stood, why it ran where it ran, what it cost, and where its time went."""
        return JSONResponse(await story_of(request, request_id))

    @app.get("/requests/{request_id:path}", tags=["qos"])
    async def show_request(request: Request, request_id: str) -> Response:
        """How far a request of the caller's is; while it waits, its place, and seconds: least, probable, most."""
        story = await story_of(request, request_id)
        names = ("id", "state", "outcome", "tier", "position", "wait_seconds")
        return JSONResponse({name: story[name] for name in names if name in story})

    @app.get("/health", tags=["health"])
    async def health() -> Response:
        """200 while of each model some ready replica makes progress: a step or a canary within the last seconds."""
        return _health(status.healthy(), status)

    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        """200 while this process serves."""
        return _health(status.live(), status)

    @app.get("/health/ready", tags=["health"])
    async def ready() -> Response:
        """200 while some replica takes requests."""
        return _health(status.ready(), status)

    @app.get("/metrics", tags=["health"])
    async def show_metrics(request: Request) -> Response:
        """Prometheus' text format, for admins: it names all owners."""
        if not request.state.identity.metrics:
            raise HttpRefusal(403, "This API key may not read the metrics: give it 'admin: true'.", code="admin_only")
        return Response(await show(), media_type=CONTENT_TYPE)

    app.include_router(interactive_routes(service, once, own, read))
    if nodes is not None:
        app.include_router(node_routes(nodes, read))
        app.include_router(overview_routes(nodes, service.names, places))
    app.routes.extend(asset_routes(pages))
    return app


async def local_page(metrics: Metrics, engines: EngineMetrics) -> bytes:
    """What one front knows, without asking others; written in a thread."""
    metrics.look()
    return await asyncio.to_thread(lambda: metrics.page() + engines.page())


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "echelon",
        "max_model_len": model.max_model_len,
    }


def _health(good: bool, status: Status) -> Response:
    states: dict[str, int] = {}
    since_step = math.inf
    for row in status.replicas():
        states[row.state] = states.get(row.state, 0) + 1
        since_step = min(since_step, row.since_step)
    body = {
        "status": "ok" if good else "unavailable",
        "replicas": states,
        "seconds_since_step": round(since_step, 2) if math.isfinite(since_step) else None,
    }
    return JSONResponse(body, 200 if good else 503)


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"({request.method} {request.url.path})"
    if error.status_code == 404:
        refusal = HttpRefusal(404, f"Invalid URL {_short(where)}", code="unknown_url")
    elif error.status_code == 405:
        refusal = HttpRefusal(
            405,
            f"Not allowed to {echo(request.method)} on {echo(request.url.path)}.",
            code="method_not_supported",
            headers=dict(error.headers or {}),
        )
    else:
        refusal = HttpRefusal(error.status_code, echo(error.detail), headers=dict(error.headers or {}))
    return error_response(refusal)


def _short(where: str) -> str:
    return where if len(where) <= 64 and where.isprintable() else echo(where)
