"""`/nodes/status`, `/nodes/add` and `/nodes/remove`, for admins: whom the dispatcher has, foreign servers included."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import AddNode, NodeAnswer, RemoveNode, ReplicaRow
from router.foreign.upstream import checked_url
from router.http.identity import require_admin
from router.protocol.errors import HttpRefusal
from router.protocol.json_entry import parse_object
from router.protocol.validation import validate
from workers.api.errors import ConfigError, InvalidRequest, NodeFailed, NoReplica

ANSWER_SECONDS = 10.0  # the dispatcher asks the node before it answers

ReadBody = Callable[[Request], Awaitable[bytes]]


class NodeStatus(BaseModel):
    """What the documents call a node's status; `unfinished` and `latency` are measured here, not taken."""

    model_config = ConfigDict(extra="forbid")

    models: list[Annotated[str, Field(min_length=1, max_length=512)]] | None = None
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # prompt tokens a second, a first guess
    unfinished: int | None = None
    latency: list[float] | None = None


class NodeBody(BaseModel):
    """The body of /nodes/add. `key` is the API key that the node wants."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    status: NodeStatus | None = None
    key: Annotated[str, Field(max_length=512, pattern=r"^[!-~]*$")] = ""


class RemoveBody(BaseModel):
    """The body of /nodes/remove."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)]


def node_routes(dispatcher: DispatcherClient, read_body: ReadBody) -> APIRouter:
    """The three routes."""
    router = APIRouter(tags=["nodes"])

    @router.get("/nodes/status")
    async def status(request: Request) -> Response:
        """All nodes by URL, and our own replicas by name: models, requests under way, learned speed, state."""
        require_admin(request.state.identity)
        nodes: dict[str, dict[str, Any]] = {}
        for row in dispatcher.rows:
            name = row.info.url or f"replica:{row.info.id}"
            _add_row(nodes.setdefault(name, {}), row)
        return JSONResponse(nodes)

    @router.post("/nodes/add")
    async def add(request: Request) -> Response:
        """Dispatch to a foreign OpenAI-compatible server, too; one that is there already is looked at anew."""
        require_admin(request.state.identity)
        body = validate(NodeBody, parse_object(await read_body(request)))
        url, given = _url(body.url), body.status or NodeStatus()
        models = tuple(given.models or ())
        fault = await _ask(dispatcher, lambda number: AddNode(number, url, models, given.speed, body.key))
        if fault:
            raise NodeFailed(f"The node {fault}.")
        return JSONResponse({"message": "Added successfully", "url": url})

    @router.post("/nodes/remove")
    async def remove(request: Request, node_url: str | None = None) -> Response:
        """Dispatch to it no more; what runs there goes on. The URL comes in the body or as `node_url`."""
        require_admin(request.state.identity)
        if node_url is None:
            node_url = validate(RemoveBody, parse_object(await read_body(request))).url
        url = _url(node_url)
        fault = await _ask(dispatcher, lambda number: RemoveNode(number, url))
        if fault:
            raise HttpRefusal(404, "There is no such node.", code="node_not_found")
        return JSONResponse({"message": "Deleted successfully", "url": url})

    return router


def _add_row(node: dict[str, Any], row: ReplicaRow) -> None:
    node.setdefault("models", []).append(row.info.model)
    node["unfinished"] = node.get("unfinished", 0) + row.leases
    node["state"] = str(row.state)
    node["speed"] = round(row.prefill_rate, 1)  # prompt tokens a second
    node["step_seconds"] = round(row.step_seconds, 6)
    node["backlog_seconds"] = round(row.backlog_seconds, 6)


def _url(text: str) -> str:
    try:
        return checked_url(text)
    except ConfigError as e:
        raise InvalidRequest(f"Invalid 'url': {e}.", param="url", code="invalid_value") from e


async def _ask(dispatcher: DispatcherClient, question: Callable[[int], Any]) -> str:
    try:
        answer = await dispatcher.ask(question, ANSWER_SECONDS)
    except ConnectionError as e:
        raise NoReplica(f"the dispatcher is not reachable: {e}") from e
    assert isinstance(answer, NodeAnswer)
    return answer.fault
