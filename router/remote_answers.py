"""`router.http.once.Answers` at the dispatcher: so a retry finds its answer whichever front it reaches."""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import Claim, Claimed, Keep, Verdict
from router.protocol.errors import HttpRefusal
from workers.api.errors import NoReplica, Overloaded

PATIENCE_SECONDS = 5.0  # without a dispatcher
MAX_UNSENT = 100  # answers that wait for a dispatcher
_AGAIN_SECONDS = 0.05


class RemoteAnswers:
    """Claims over `client`. After the dispatcher was away, what runs here is claimed again."""

    def __init__(self, client: DispatcherClient, patience: float = PATIENCE_SECONDS) -> None:
        self._client, self._patience = client, patience
        self._running: dict[bytes, bytes] = {}  # key: digest of the body
        self._unsent: deque[Keep] = deque(maxlen=MAX_UNSENT)
        client.on_opened.append(self._claim_again)

    async def claim(self, key: bytes, body: bytes, *, wait: bool) -> bytes | None:
        """See `Answers`."""
        answer = await self._ask(key, body, wait)
        match answer.verdict:
            case Verdict.FIRST:
                self._running[key] = body
                return None
            case Verdict.KEPT:
                return answer.answer
            case Verdict.RUNNING:
                raise HttpRefusal(409, "A request with this Idempotency-Key is running.", code="idempotency_key_in_use")
            case Verdict.OTHER_BODY:
                raise HttpRefusal(
                    422, "This Idempotency-Key was used with another body.", code="idempotency_key_reused"
                )
            case Verdict.FULL:
                raise Overloaded("too many requests with idempotency keys are running", retry_after=1.0)

    def keep(self, key: bytes, body: bytes, answer: bytes) -> None:
        """See `Answers`. Without a dispatcher the answer waits for the next one."""
        self._running.pop(key, None)
        if self._client.connected:
            self._client.tell(Keep(key, body, answer))
        else:
            self._unsent.append(Keep(key, body, answer))

    async def _ask(self, key: bytes, body: bytes, wait: bool) -> Claimed:
        since = monotonic()
        while True:
            try:
                answer = await self._client.ask(lambda number: Claim(number, key, body, wait))
            except ConnectionError as e:
                if self._client.connected:
                    since = monotonic()
                if monotonic() - since > self._patience:
                    raise NoReplica(f"the idempotency key cannot be looked up: {e}", retry_after=2.0) from e
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                assert isinstance(answer, Claimed)
                return answer

    def _claim_again(self) -> None:
        while self._unsent:
            self._client.tell(self._unsent.popleft())
        for key, body in self._running.items():
            self._client.tell(Claim(0, key, body, wait=False))
