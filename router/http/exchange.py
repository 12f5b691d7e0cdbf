"""The answer to one generation: waits for acceptance, then streams events or collects a body.

The 200 header goes out after the generator's first batch, so that refusals have their own status. A stream that fails
later ends with its error, and without `[DONE]`. A client that goes away, or reads nothing for too long, closes the
generator: it must not keep its lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.generation import Batch, Generator
from router.http.batches import generate_all
from router.http.gate import error_response
from router.http.job import Job
from router.http.outlet import EventStream, Outlet, Turn, until_gone
from router.http.reading import Reading
from router.metrics import Meter
from router.protocol.errors import answer_for, code_of, is_refusal
from workers.api.errors import EchelonError, EngineFault

log = logging.getLogger("echelon.http")
_STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Exchange(Response):
    """Runs `job` on `generator` and answers with the result; `ended` is called at the end, with the cached tokens.

    All exchanges of a front share a `turn`. A write that the client does not take within `patience` seconds ends the
    answer.
    """

    def __init__(
        self,
        job: Job,
        generator: Generator,
        meter: Meter,
        ended: Callable[[Job, Meter, int], None],
        turn: Turn,
        patience: float,
    ) -> None:
        self.background = None
        self._turn, self._patience = turn, patience
        self._job, self._generator, self._meter, self._ended = job, generator, meter, ended
        self._reading = Reading(job, meter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client goes away; afterwards the generator is closed."""

        def cut() -> None:
            work.cancel()

        outlet = Outlet(send, self._patience, cut)
        work = asyncio.create_task(self._run(scope, receive, outlet))
        try:
            await until_gone(work, outlet, receive)
        finally:
            if outlet.stalled:  # what is left of the answer is dropped, and the server closes the connection
                self._meter.failed("client_stalled")
                log.warning("generation %s: unread for %g s", self._job.requests[0].id, self._patience)
            self._end()
        if not work.cancelled():
            work.result()

    async def whole(self) -> Response:
        """The whole answer, or its error's; nobody who goes away stops it."""
        try:
            return await self._collect()
        finally:
            self._end()

    def _end(self) -> None:
        self._ended(self._job, self._meter, self._reading.usage().cached_tokens)

    async def _run(self, scope: Scope, receive: Receive, outlet: Outlet) -> None:
        if self._job.stream:
            await self._stream(scope, receive, outlet)
        else:
            await (await self._collect())(scope, receive, outlet)

    async def _collect(self) -> Response:
        try:
            answer = await self._reading.collect(self._generator)
        except Exception as e:
            return error_response(self._failed(e))
        return Response(self._job.format.body(answer.choices, answer.usage), media_type="application/json")

    async def _stream(self, scope: Scope, receive: Receive, outlet: Outlet) -> None:
        reading, job = self._reading, self._job
        events = EventStream(outlet, scope, self._turn)
        first = asyncio.Event()  # batch, or the end without one
        begun = started = False

        def take(batch: Batch) -> bool:
            nonlocal begun
            text = reading.events(batch)
            if not begun:
                begun = True
                first.set()
                text = "".join(job.format.opening(c.index) for c in job.choices) + text
            if text:
                events.put(text)
            return reading.left > 0

        work = asyncio.create_task(generate_all(self._generator, job.requests, take))
        work.add_done_callback(lambda _: first.set())
        try:
            await first.wait()
            if begun:
                started = True
                headers = [(b"content-type", job.format.content_type), *_STREAM_HEADERS]
                await outlet({"type": "http.response.start", "status": 200, "headers": headers})
                try:
                    await events.relay(work)
                finally:
                    self._meter.streamed(straight=events.straight)
            await work
            reading.check_finished()
            usage = job.format.usage(reading.usage()) if job.usage_wanted else ""
            await events.end(usage + job.format.done)
        except Exception as e:
            error = self._failed(e)
            if started:
                await events.end(job.format.error(answer_for(error).body))
            else:
                await error_response(error)(scope, receive, outlet)
        finally:
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # it has been told, or nobody is left to hear it

    def _failed(self, error: Exception) -> Exception:
        self._meter.failed(code_of(error), refused=is_refusal(error))
        if not isinstance(error, EchelonError):
            log.error("generation %s failed", self._job.requests[0].id, exc_info=error)
        elif isinstance(error, EngineFault):
            log.error("generation %s failed: %s", self._job.requests[0].id, error)
        return error
