"""Requests that a foreign node may serve: leased like all others, then handed on over HTTP as they came.

The node's own status and body are the client's answer, also where it refuses. Another node is tried only before the
first byte of an answer. A stream that breaks off ends with an error event and without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from time import monotonic
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import Acquire, AddNode, Granted, Outcome, Settle
from router.foreign.node import key_header
from router.foreign.tally import SseTally, prompt_estimate, usage_of
from router.foreign.upstream import Deadlines, Upstream
from router.generation import Handover, Trace
from router.http.gate import error_response
from router.http.identity import Identity
from router.http.job import Job
from router.http.outlet import Outlet, until_gone
from router.metrics import Meter
from router.protocol.errors import answer_for, code_of, is_refusal
from router.protocol.sse import error_event
from router.request_log import log_relayed
from router.service import Service
from workers.api.errors import EchelonError, NodeFailed, NoReplica

ROUTES = ("/v1/chat/completions", "/v1/completions")  # that others have, too
MOST_TRIES = 3
MOST_BYTES = 64 << 20  # of an answer in one piece
DEFAULT_OUTPUT = 512  # tokens, where a body names no limit
_PASSED_ON = ("content-type", "retry-after")

log = logging.getLogger("echelon.http")


@dataclass(frozen=True, slots=True)
class Relayed:
    """One request as it came. `job` is the same for our own replicas, where the model has some."""

    route: str
    body: bytes
    model: str
    stream: bool
    prompt_tokens: int  # an estimate, where there is no tokenizer
    max_tokens: int
    choices: int
    identity: Identity
    sub: str = ""  # which of the owner's own users asks
    priority: int = 0
    job: Job | None = None


def relayed(route: str, raw: bytes, body: dict[str, Any], identity: Identity, job: Job | None = None) -> Relayed:
    """What the relay needs of a parsed `body`. Strange values are the node's to refuse."""
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    n, user, priority = body.get("n"), body.get("user"), body.get("priority")
    return Relayed(
        route,
        raw,
        str(body.get("model", "")),
        body.get("stream") is True,
        job.prompt_tokens if job is not None else prompt_estimate(body),
        limit if isinstance(limit, int) and limit > 0 else DEFAULT_OUTPUT,
        n if isinstance(n, int) and 1 <= n <= 128 else 1,
        identity,
        user[:64] if isinstance(user, str) else "",
        priority if type(priority) is int and abs(priority) < 2**31 else 0,
        job,
    )


class Relay:
    """The foreign nodes of one front. `own` answers a job on our own replicas."""

    def __init__(
        self,
        dispatcher: DispatcherClient,
        service: Service,
        own: Callable[[Job], Response],
        deadlines: Deadlines | None = None,
    ) -> None:
        self.dispatcher, self.service, self.own = dispatcher, service, own
        self.patience = service.config.stalled_seconds
        self.metrics = service.metrics
        self.deadlines = deadlines or Deadlines()
        self._numbers = count()
        dispatcher.on_opened.append(self._remind)

    async def take(self, route: str, raw: bytes, identity: Identity) -> Response | None:
        """The answer to a body whose model some foreign node serves; None: it is for our own replicas alone.

        Raises RequestError for a body that nobody could serve.
        """
        names = self.models()
        if not names or route not in ROUTES:
            return None
        body = await self.service.parsed(raw)
        model = body.get("model")
        if model not in names or not identity.may_use(str(model)):
            return None
        if not self.service.serves(str(model)):
            return self.answer(relayed(route, raw, body, identity))
        job = await self.service.job(route, raw, identity)
        return self.answer(relayed(route, raw, body, identity, job)) if len(job.requests) == 1 else self.own(job)

    def models(self) -> tuple[str, ...]:
        """Names that foreign nodes serve, in the order they were added."""
        return tuple(dict.fromkeys(row.info.model for row in self.dispatcher.rows if row.info.url))

    def answer(self, request: Relayed) -> Response:
        """The answer to `request`; it is leased when it is sent."""
        return _RelayExchange(self, request)

    def _remind(self) -> None:
        """A dispatcher that was restarted knows only the nodes of its configuration: it is told of the others."""
        nodes: dict[str, list[str]] = {}
        keys: dict[str, str] = {}
        for row in self.dispatcher.rows:
            if row.info.url:
                nodes.setdefault(row.info.url, []).append(row.info.model)
                keys[row.info.url] = row.info.key
        for url, models in nodes.items():
            self.dispatcher.tell(AddNode(0, url, tuple(models), None, keys[url]))

    def ask(self, request: Relayed, since: float, excluded: tuple[str, ...]) -> Acquire:
        """The next try's lease."""
        job = request.job
        return Acquire(
            lease_id=f"{self.dispatcher.name}/relay{next(self._numbers)}",
            model=request.model,
            prompt_tokens=max(request.prompt_tokens, 1),
            max_tokens=request.max_tokens,
            choices=request.choices,
            owner=request.identity.owner,
            tier=request.identity.tier if job is None else job.requests[0].tier,
            sub=request.sub if job is None else job.requests[0].sub,
            route=request.route,
            age=monotonic() - since,
            excluded=excluded,
            foreign=True,
            priority=request.priority,
        )


class _RelayExchange(Response):
    def __init__(self, relay: Relay, request: Relayed) -> None:
        self.background = None
        self._relay, self._request = relay, request
        self._trace = Trace()
        self._meter: Meter | None = None
        self._handover: Handover | None = None  # of a lease on a replica of ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client goes away or takes nothing."""

        def cut() -> None:
            work.cancel()

        outlet = Outlet(send, self._relay.patience, cut)
        work = asyncio.create_task(self._run(scope, receive, outlet))
        try:
            await until_gone(work, outlet, receive)
        finally:
            if outlet.stalled and self._meter is not None:
                self._meter.failed("client_stalled")
            if self._meter is not None:
                self._meter.close()
                log_relayed(self._request.identity, self._request.route, self._request.model, self._meter)
            if self._handover is not None and work.cancelled():
                self._give_up(self._handover)
        if work.cancelled():
            return
        work.result()
        if self._handover is not None:
            await self._own(self._handover, scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay, request, since = self._relay, self._request, monotonic()
        excluded: tuple[str, ...] = ()
        for attempt in range(1, MOST_TRIES + 1):
            ask = relay.ask(request, since, excluded)
            handover = Handover(ask.lease_id)
            try:
                granted = await relay.dispatcher.acquire(ask, handover.tell)
            except EchelonError as e:
                await self._refuse(e, scope, receive, send)
                return
            if not granted.replica.url:
                handover.granted, self._handover = granted, handover
                return
            lease = _Lease(relay.dispatcher, ask, granted)
            meter = self._metered()
            self._trace.replica, self._trace.replays = granted.replica.url, attempt - 1
            self._trace.queue_seconds = monotonic() - since
            try:
                await self._hand_on(lease, meter, scope, receive, send)
                return
            except NodeFailed as e:
                lease.outcome = Outcome.LOST
                log.warning("node %s: %s", granted.replica.url, e)
                if e.answered or attempt == MOST_TRIES:
                    text = f"The node that serves {request.model} failed: {e}."
                    await self._refuse(NodeFailed(text), scope, receive, send)
                    return
                excluded = (*excluded, granted.replica.id)
            finally:
                lease.settle()

    async def _hand_on(self, lease: _Lease, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises NodeFailed while nothing of the answer was sent."""
        request, info = self._request, lease.granted.replica
        upstream = await Upstream.open(
            "POST",
            info.url + request.route,
            headers={"content-type": "application/json", **key_header(info.key)},
            body=request.body,
            deadlines=self._relay.deadlines,
        )
        try:
            kind = upstream.headers.get("content-type", "")
            if upstream.status == 200 and kind.startswith("text/event-stream"):
                await self._stream(upstream, lease, meter, send)
                return
            body = await upstream.whole(MOST_BYTES)
        finally:
            await upstream.close()
        if upstream.status < 400:
            lease.prompt, lease.cached, lease.output = usage_of(body, request.prompt_tokens)
            lease.outcome = Outcome.COMPLETED
            meter.tokens(0, lease.output)
            meter.finished("stop")
        else:
            lease.outcome = Outcome.FAILED
            meter.failed(f"node_{upstream.status}", refused=upstream.status < 500)
        headers = {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}
        await Response(body, upstream.status, headers)(scope, receive, send)

    async def _stream(self, upstream: Upstream, lease: _Lease, meter: Meter, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        tally, begun = SseTally(), False
        lease.prompt = self._request.prompt_tokens
        try:
            async for part in upstream.parts():
                if not begun:  # before it, another node may be tried
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                before = tally.tokens
                tally.feed(part)
                lease.prompt, lease.cached, lease.output = tally.counts(self._request.prompt_tokens)
                if tally.tokens > before:
                    lease.first()
                    meter.tokens(0, tally.tokens - before)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            if not begun or not tally.done:
                raise NodeFailed("ended its stream without [DONE]", answered=begun)
        except NodeFailed as e:
            if not begun:
                raise
            lease.outcome = Outcome.FAILED
            meter.failed("node_failed")
            text = f"The node that serves {self._request.model} failed: {e}."
            event = error_event(answer_for(NodeFailed(text)).body)
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
            return
        lease.outcome = Outcome.COMPLETED
        meter.finished("stop")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _own(self, handover: Handover, scope: Scope, receive: Receive, send: Send) -> None:
        """The lease is on a replica of ours, whose way of answering is the usual one."""
        job = self._request.job
        try:
            if job is None:  # the model has come to our own replicas since this request was looked at
                error = NoReplica("the cluster has just changed: try again")
                await error_response(error)(scope, receive, send)
                return
            job.requests = (replace(job.requests[0], handover=handover),)
            await self._relay.own(job)(scope, receive, send)
        finally:
            self._give_up(handover)

    def _give_up(self, handover: Handover) -> None:
        """The lease has ended, if nobody settled it."""
        self._relay.dispatcher.settle(Settle(handover.lease_id, Outcome.ABORTED))

    def _metered(self) -> Meter:
        """The request's meter, which starts with the first call."""
        if self._meter is None:
            request, who = self._request, self._request.identity
            self._meter = self._relay.metrics.request(
                request.model, who.tier, who.owner, request.prompt_tokens, [self._trace]
            )
        return self._meter

    async def _refuse(self, error: EchelonError, scope: Scope, receive: Receive, send: Send) -> None:
        meter = self._metered()
        meter.failed(code_of(error), refused=is_refusal(error))
        await error_response(error)(scope, receive, send)


class _Lease:
    """A lease on a foreign node, and its bill."""

    def __init__(self, dispatcher: DispatcherClient, ask: Acquire, granted: Granted) -> None:
        self._dispatcher, self._ask, self.granted = dispatcher, ask, granted
        self._since = monotonic()
        self._first = 0.0
        self.outcome = Outcome.ABORTED  # unless it comes to another end
        self.prompt = self.cached = self.output = 0

    def first(self) -> None:
        """The first token came, if it was not there before."""
        self._first = self._first or monotonic() - self._since

    def settle(self) -> None:
        """It has ended."""
        self._dispatcher.settle(
            Settle(
                self._ask.lease_id,
                self.outcome,
                prefill_tokens=max(self.prompt - self.cached, 0),
                decode_tokens=self.output,
                cached_tokens=self.cached,
                output_tokens=self.output,
                first_seconds=self._first,
            )
        )
