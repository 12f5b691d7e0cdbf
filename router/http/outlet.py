"""Where an answer goes: a server's `send`, watched for clients that do not take it, and the short way for streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from router.http.straight import straight_write
from workers.api.errors import EngineFault

LOOKS = 4  # at a write under way, in the time it may take
MOST_HELD = 1 << 20  # characters of events that a client may be behind, beyond the server's and the kernel's buffers


class Outlet:
    """The server's `send`, watched: a write that the client does not take within `patience` seconds calls `cut`.

    One timer an answer looks at it now and then. A timer a write would cost more than the write: nearly all of them
    are over at once.
    """

    def __init__(self, send: Send, patience: float, cut: Callable[[], object]) -> None:
        self.stalled = False
        self._send = send
        self._pause, self._cut = patience / LOOKS, cut
        self._begun = self._ended = self._seen = self._looks = 0
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._look)

    async def __call__(self, message: Message) -> None:
        """Send `message` of the answer."""
        self._begun += 1
        await self._send(message)
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


async def until_gone(work: asyncio.Task[None], outlet: Outlet, receive: Receive) -> None:
    """Return when `work`, which answers through `outlet`, has ended; it is cancelled when the client goes away.

    What it raised is for the caller to ask.
    """
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        outlet.close()
        work.cancel()
        gone.cancel()
        await asyncio.wait({work, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Turn:
    """The streams that got events in this turn of the loop: each writes them in one piece at its end.

    A front that lags behind its engines reads several steps at a time, and so it writes them at a time.
    """

    def __init__(self) -> None:
        self._streams: list[EventStream] = []

    def add(self, stream: EventStream) -> None:
        """`stream` has something to write."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._end)
        self._streams.append(stream)

    def _end(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.write()


class EventStream:
    """The events of one stream on their way to `outlet`. They are ASCII.

    They are written at the end of the turn while the client takes what it gets and the server shows its connection
    (`straight_write`). Else they are held, and `relay` sends them, as many as there are in one piece, when the client
    has taken those before. So a step costs its streams no wake-up each, and who reads slowly holds nobody up.
    """

    def __init__(self, outlet: Outlet, scope: Scope, turn: Turn) -> None:
        self.straight = False  # whether they pass by the server's layers; known once the answer has begun
        self._outlet, self._scope, self._turn = outlet, scope, turn
        self._write: Callable[[str], bool] | None = None  # while nobody waits for the client
        self._held: list[str] = []
        self._size = 0
        self._sending = False  # the client is waited for
        self._filled = asyncio.Event()  # there is something for `relay`

    def put(self, events: str) -> None:
        """Send `events`, soon or later. Raises EngineFault for a reader that is too far behind.

        It is not while it takes what it gets, nor by one piece: what shows a prompt may be long, and several beam
        searches may end at once.
        """
        self._held.append(events)
        self._size += len(events)
        if self._write is None:
            self._filled.set()
        elif len(self._held) == 1:
            self._turn.add(self)
        if self._size > MOST_HELD and self._sending and self._size - max(map(len, self._held)) > MOST_HELD:
            raise EngineFault(f"the reader of this stream is {self._size} bytes behind")

    def write(self) -> None:
        """At the end of a turn: write what is held, or leave it to `relay`."""
        if self._write is None or not self._held:
            return
        try:
            taken = self._write(self._held[0] if len(self._held) == 1 else "".join(self._held))
        except RuntimeError:  # closed in this turn: `relay` hears of it, and the other streams are written
            taken = False
        if taken:
            self._held.clear()
            self._size = 0
        else:
            self._write = None
            self._filled.set()

    async def relay(self, work: asyncio.Future[None]) -> None:
        """The answer has begun: send what is put until `work` is done."""
        self.straight = straight_write(self._scope) is not None
        work.add_done_callback(self._wake)
        try:
            while True:
                self._filled.clear()
                await self._flush()
                if work.done():
                    return
                self._write = straight_write(self._scope)
                await self._filled.wait()
        finally:
            self._write = None
            work.remove_done_callback(self._wake)

    async def end(self, events: str) -> None:
        """Send the last of them, and the end of the body."""
        await self._outlet({"type": "http.response.body", "body": events.encode("ascii"), "more_body": False})

    async def _flush(self) -> None:
        while self._held:
            body = "".join(self._held).encode("ascii")
            self._held.clear()
            self._size = 0
            self._sending = True
            await self._outlet({"type": "http.response.body", "body": body, "more_body": True})
            self._sending = False

    def _wake(self, work: asyncio.Future[None]) -> None:
        self._filled.set()
