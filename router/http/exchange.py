"""The answer to one generation: waits for acceptance, then streams events or collects a body.

The 200 header goes out after the generator's first batch, so that refusals have their own status. A stream that fails
later ends with an error event and without `[DONE]`. A client that goes away, or reads nothing for too long, closes the
generator: it must not keep its lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from router.generation import ChoiceDelta, Generator
from router.http.batches import Batch, close, open_batches
from router.http.gate import error_response
from router.http.job import Job
from router.http.reading import Reading
from router.metrics import Meter
from router.protocol.errors import answer_for, code_of, is_refusal
from router.protocol.sse import CONTENT_TYPE, DONE, error_event
from router.request_log import log_finished
from workers.api.errors import EchelonError, EngineFault

log = logging.getLogger("echelon.http")
_STREAM_HEADERS = [
    (b"content-type", CONTENT_TYPE),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class _Stalled(Exception):
    """The client has read nothing for too long."""


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

        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(self._patience):
                    await send(message)
            except TimeoutError as e:
                raise _Stalled from e

        work = asyncio.create_task(self._run(scope, receive, patient))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
            self._meter.close()
            log_finished(self._job, self._meter, self._reading.usage().cached_tokens)
        if not work.cancelled():
            work.result()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        batches = open_batches(self._generator, self._job.requests)
        try:
            if self._job.stream:
                await self._stream(batches, scope, receive, send)
            else:
                await (await self._collect(batches))(scope, receive, send)
        except _Stalled:  # what is left of the answer is dropped, and the server closes the connection
            self._meter.failed("client_stalled")
            log.warning("generation %s: unread for %g s", self._job.requests[0].id, self._patience)
        finally:
            await close(batches)

    async def _collect(self, batches: AsyncIterator[Batch]) -> Response:
        try:
            answer = await self._reading.collect(batches)
        except Exception as e:
            return error_response(self._failed(e))
        return Response(self._job.format.body(answer.choices, answer.usage), media_type="application/json")

    async def _stream(self, batches: AsyncIterator[Batch], scope: Scope, receive: Receive, send: Send) -> None:
        form = self._job.format
        started = False
        try:
            async for batch in batches:
                events = [e for item in batch for e in self._events(item)]
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": list(_STREAM_HEADERS)})
                    events[:0] = [form.opening(c.index) for c in self._job.choices]
                if events:
                    await _write(send, "".join(events))
                if not self._reading.left:
                    break
            self._reading.check_finished()
        except _Stalled:
            raise
        except Exception as e:
            error = self._failed(e)
            if not started:
                await error_response(error)(scope, receive, send)
                return
            await _write(send, error_event(answer_for(error).body), last=True)
            return
        usage = form.usage(self._reading.usage()) if self._job.usage_wanted else ""
        await _write(send, usage + DONE, last=True)

    def _events(self, item: ChoiceDelta) -> list[str]:
        choice, form = self._job.choices[item.choice], self._job.format
        if choice.is_over():
            return []
        text = self._reading.push(item)
        tokens = choice.take_tokens()
        events = [form.text(choice.index, text, tokens)] if text or tokens else []
        if choice.is_over():
            events.append(form.finish(choice.index, choice.finish or ""))
        return events

    def _failed(self, error: Exception) -> Exception:
        self._meter.failed(code_of(error), refused=is_refusal(error))
        if not isinstance(error, EchelonError):
            log.error("generation %s failed", self._job.requests[0].id, exc_info=error)
        elif isinstance(error, EngineFault):
            log.error("generation %s failed: %s", self._job.requests[0].id, error)
        return error


async def _write(send: Send, text: str, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": not last})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
