"""The answer to one generation: waits for acceptance, then streams events or collects a body.

The 200 header goes out after the generator's first batch, so that refusals have their own status. A stream that fails
later ends with an error event and without `[DONE]`. A client that goes away, or reads nothing for too long, closes the
generator: it must not keep its lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.generation import Generator
from router.http.batches import Batch, close, open_batches
from router.http.gate import error_response, server_send
from router.http.job import Job
from router.http.reading import Reading
from router.metrics import Meter
from router.protocol.errors import answer_for, code_of, is_refusal
from router.protocol.sse import CONTENT_TYPE, DONE, error_event
from router.request_log import log_finished
from workers.api.errors import EchelonError, EngineFault

LOOKS = 4  # at a write under way, in the time it may take

log = logging.getLogger("echelon.http")
_STREAM_HEADERS = [
    (b"content-type", CONTENT_TYPE),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Outlet:
    """The server's `send`, watched: a write that the client does not take within `patience` seconds calls `cut`.

    One timer a stream looks at it now and then. A timer a write would cost more than the write: nearly all of them
    are over at once.
    """

    def __init__(self, scope: Scope, send: Send, patience: float, cut: Callable[[], object]) -> None:
        self.stalled = False
        self._send, self._write = send, server_send(scope, send)
        self._pause, self._cut = patience / LOOKS, cut
        self._begun = self._ended = self._seen = self._looks = 0
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._look)

    async def __call__(self, message: Message) -> None:
        self._begun += 1
        await self._send(message)
        self._ended = self._begun

    async def write(self, text: str, *, last: bool = False) -> None:
        """Send `text` (ASCII) as a part of the body."""
        self._begun += 1
        await self._write({"type": "http.response.body", "body": text.encode("ascii"), "more_body": not last})
        self._ended = self._begun

    def close(self) -> None:
        """Nobody looks any more."""
        self._timer.cancel()

    def _look(self) -> None:
        under_way = self._begun != self._ended
        self._looks = self._looks + 1 if under_way and self._begun == self._seen else 0
        self._seen = self._begun
        if self._looks == LOOKS:
            self.stalled = True
            self._cut()
        else:
            self._timer = asyncio.get_running_loop().call_later(self._pause, self._look)


class Exchange(Response):
    """Runs `job` on `generator` and answers with the result; `meter` is closed at the end.

    A write that the client does not take within `patience` seconds ends the answer.
    """

    def __init__(self, job: Job, generator: Generator, meter: Meter, patience: float = 60.0) -> None:
        self.background = None
        self._patience = patience
        self._job, self._generator, self._meter = job, generator, meter
        self._reading = Reading(job, meter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop when the client goes away; afterwards the generator is closed."""

        def cut() -> None:
            work.cancel()

        outlet = _Outlet(scope, send, self._patience, cut)
        work = asyncio.create_task(self._run(scope, receive, outlet))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            outlet.close()
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
            if outlet.stalled:  # what is left of the answer is dropped, and the server closes the connection
                self._meter.failed("client_stalled")
                log.warning("generation %s: unread for %g s", self._job.requests[0].id, self._patience)
            self._end()
        if not work.cancelled():
            work.result()

    async def whole(self) -> Response:
        """The whole answer, or its error's; nobody who goes away stops it."""
        batches = open_batches(self._generator, self._job.requests)
        try:
            return await self._collect(batches)
        finally:
            await close(batches)
            self._end()

    def _end(self) -> None:
        self._meter.close()
        log_finished(self._job, self._meter, self._reading.usage().cached_tokens)

    async def _run(self, scope: Scope, receive: Receive, send: _Outlet) -> None:
        batches = open_batches(self._generator, self._job.requests)
        try:
            if self._job.stream:
                await self._stream(batches, scope, receive, send)
            else:
                await (await self._collect(batches))(scope, receive, send)
        finally:
            await close(batches)

    async def _collect(self, batches: AsyncIterator[Batch]) -> Response:
        try:
            answer = await self._reading.collect(batches)
        except Exception as e:
            return error_response(self._failed(e))
        return Response(self._job.format.body(answer.choices, answer.usage), media_type="application/json")

    async def _stream(self, batches: AsyncIterator[Batch], scope: Scope, receive: Receive, send: _Outlet) -> None:
        reading, job = self._reading, self._job
        started = False
        try:
            async for batch in batches:
                events = reading.events(batch)
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
                    events = "".join(job.format.opening(c.index) for c in job.choices) + events
                if events:
                    await send.write(events)
                if not reading.left:
                    break
            reading.check_finished()
        except Exception as e:
            error = self._failed(e)
            if not started:
                await error_response(error)(scope, receive, send)
                return
            await send.write(error_event(answer_for(error).body), last=True)
            return
        usage = job.format.usage(reading.usage()) if job.usage_wanted else ""
        await send.write(usage + DONE, last=True)

    def _failed(self, error: Exception) -> Exception:
        self._meter.failed(code_of(error), refused=is_refusal(error))
        if not isinstance(error, EchelonError):
            log.error("generation %s failed", self._job.requests[0].id, exc_info=error)
        elif isinstance(error, EngineFault):
            log.error("generation %s failed: %s", self._job.requests[0].id, error)
        return error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
