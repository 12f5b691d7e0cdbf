"""`Idempotency-Key`: a retry gets the bytes of the first answer and is charged once.

Keys are per owner and route, and hold for the same body only. The answer of a whole (not streamed) request is kept for
a minute once it is 200; errors are not, and may be retried. Such a request outlives its connection: who sends a key
comes back for the answer. A stream cannot be repeated: while it runs its key is taken (409), afterwards it is free.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Protocol

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.exchange import Exchange
from workers.api.errors import InvalidRequest

HEADER = "idempotency-key"
REPLAYED = {"idempotent-replayed": "true"}
_SANE_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Answers(Protocol):
    """Where answers are kept, for all fronts."""

    async def claim(self, key: bytes, body: bytes, *, wait: bool) -> bytes | None:
        """The answer kept for `key`, or None: this caller is first and owes a `keep`.

        With `wait`, a key that runs elsewhere is waited for. `body` is a digest. Raises HttpRefusal (409, 422),
        Overloaded or NoReplica.
        """

    def keep(self, key: bytes, body: bytes, answer: bytes) -> None:
        """The claim ends; an empty answer says that there is none."""


def key_of(headers: Headers, owner: str, route: str) -> bytes | None:
    """A digest of who, where and the header's value; None without the header. Raises InvalidRequest."""
    value = headers.get(HEADER)
    if value is None:
        return None
    if not _SANE_KEY.fullmatch(value):
        raise InvalidRequest("The Idempotency-Key header must be 1 to 255 visible ASCII characters.")
    digest = hashlib.sha256()
    for part in (owner.encode(), route.encode(), value.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


class Once:
    """Answers to keyed requests of one front."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._running: set[asyncio.Task[Response]] = set()

    async def claim(self, key: bytes, body: bytes, *, stream: bool) -> Response | None:
        """The answer kept for `key`; None = run it by `first`. Raises what `Answers.claim` raises."""
        kept = await self._answers.claim(key, hashlib.sha256(body).digest(), wait=not stream)
        return None if kept is None else Response(kept, media_type="application/json", headers=REPLAYED)

    def first(self, key: bytes, body: bytes, exchange: Exchange, *, stream: bool) -> Response:
        """The answer of `exchange`, which holds the claim until its end."""
        digest = hashlib.sha256(body).digest()
        if stream:
            return _Stream(exchange, self._answers, key, digest)
        task = asyncio.create_task(self._whole(exchange, key, digest))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return _Whole(task)

    def give_up(self, key: bytes, body: bytes) -> None:
        """Nothing runs for `key` after all; the next one that has it is first."""
        self._answers.keep(key, hashlib.sha256(body).digest(), b"")

    async def _whole(self, exchange: Exchange, key: bytes, digest: bytes) -> Response:
        answer = b""
        try:
            response = await exchange.whole()
            if response.status_code == 200:
                answer = bytes(response.body)
            return response
        finally:
            self._answers.keep(key, digest, answer)

    async def close(self) -> None:
        """What still runs is aborted."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Whole(Response):
    def __init__(self, task: asyncio.Task[Response]) -> None:
        self.background = None
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await asyncio.shield(self._task)  # the client may go; its request goes on
        await response(scope, receive, send)


class _Stream(Response):
    def __init__(self, exchange: Exchange, answers: Answers, key: bytes, digest: bytes) -> None:
        self.background = None
        self._exchange, self._answers, self._key, self._digest = exchange, answers, key, digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._exchange(scope, receive, send)
        finally:
            self._answers.keep(self._key, self._digest, b"")
