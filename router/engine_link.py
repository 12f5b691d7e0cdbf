"""The one connection to each replica, and the streams of sequences on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from workers.api.channel import Channel, dial
from workers.api.errors import ReplicaLost
from workers.api.replica import LoadReport, ReplicaInfo
from workers.api.request import Delta, EngineRequest
from workers.api.wire import ENGINE_CODEC, Abort, StepFrame, Submit, Welcome

_REACH_SECONDS = 2.0  # for connection and Welcome: who waits for them has been given another replica by then

log = logging.getLogger("echelon.sessions")

DeltaSink = Callable[[tuple[Delta, ...]], bool]


class Stream:
    """The sequences of one submission. `sink` gets each step's deltas, in the order of the engine's steps.

    It says whether more is wanted. What it raises is this stream's failure and nobody else's.
    """

    def __init__(self, link: EngineLink, ids: Sequence[str], sink: DeltaSink) -> None:
        self._link, self._sink = link, sink
        self._over: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.alone = len(ids) == 1
        self.open_ids = set(ids)  # whose last delta has not arrived

    async def ended(self) -> None:
        """Return once the sink wants no more. Raises ReplicaLost, and what the sink raised."""
        error = await self._over
        if error is not None:
            raise error

    def put(self, deltas: tuple[Delta, ...]) -> None:
        """One step's deltas."""
        if self._over.done():
            return
        try:
            if not self._sink(deltas):
                self._over.set_result(None)
        except Exception as e:  # the other streams of this step go on
            self.fail(e)

    def fail(self, error: Exception) -> None:
        """No more deltas will come; the first failure counts."""
        if not self._over.done():
            self._over.set_result(error)

    def close(self) -> None:
        """What still runs is aborted; nothing arrives any more. Closing twice is closing once."""
        self._link.drop(self.open_ids)
        self.open_ids = set()


class EngineLink:
    """A connection to one replica. Frames of sequences that are not known (any more) are dropped: they are fenced."""

    def __init__(self, info: ReplicaInfo) -> None:
        self.info = info
        self.load: LoadReport | None = None
        self._channel: Channel | None = None
        self._streams: dict[str, Stream] = {}
        self._welcomed: asyncio.Future[ReplicaInfo] = asyncio.get_running_loop().create_future()

    async def open(self, *, secret: str, name: str) -> None:
        """Connected, and the peer is the replica we meant. Raises ReplicaLost otherwise."""
        info = self.info
        try:
            async with asyncio.timeout(_REACH_SECONDS):
                await dial(info.host, info.port, codec=ENGINE_CODEC, secret=secret, name=name, handler=self)
                welcomed = await self._welcomed
        except (OSError, TimeoutError) as e:
            self.close("no Welcome")
            raise ReplicaLost(f"replica {info.id} cannot be reached: {type(e).__name__}: {e}") from e
        except asyncio.CancelledError:
            self.close("not wanted any more")
            raise
        if welcomed.id != info.id:
            self.close("another replica")
            raise ReplicaLost(f"replica {info.id} is gone: {welcomed.id} answers at {info.host}:{info.port}")

    @property
    def is_open(self) -> bool:
        """Whether sequences can be submitted."""
        return self._channel is not None and self._channel.is_open

    @property
    def streams(self) -> int:
        """Sequences whose last delta has not come."""
        return len(self._streams)

    def submit(self, requests: Sequence[EngineRequest], sink: DeltaSink) -> Stream:
        """The sequences are on their way; their ids must be new. `sink` hears of them from the loop's next turn on.

        Raises ReplicaLost if the connection is closed; WireError, with nothing sent, if they are too large for a frame.
        """
        if self._channel is None or not self._channel.is_open:
            raise ReplicaLost(f"the connection to replica {self.info.id} is closed")
        self._channel.send(Submit(tuple(requests)))  # first: it raises WireError when they are too large for a frame
        stream = Stream(self, [name for r in requests for name in r.answer_ids], sink)
        self._streams |= dict.fromkeys(stream.open_ids, stream)
        return stream

    def drop(self, request_ids: set[str]) -> None:
        """Abort these sequences and forget them."""
        known = tuple(i for i in sorted(request_ids) if self._streams.pop(i, None) is not None)
        if known and self._channel is not None and self._channel.is_open:
            self._channel.send(Abort(known))

    def close(self, reason: str = "closed here") -> None:
        """The connection ends; its streams fail with ReplicaLost."""
        if self._channel is not None:
            self._channel.close(reason)

    # workers.api.channel.Handler

    def opened(self, channel: Channel) -> None:
        """Connected."""
        self._channel = channel

    def received(self, channel: Channel, message: object) -> None:
        """Hand each stream what the step made for it, in one batch."""
        if isinstance(message, StepFrame):
            self.load = message.load
            self._step(message.deltas)
        elif isinstance(message, Welcome):
            if not self._welcomed.done():
                self._welcomed.set_result(message.info)
        else:
            channel.close(f"an engine does not send {type(message).__name__}")

    def closed(self, channel: Channel, reason: str) -> None:
        """All streams fail."""
        if not self._welcomed.done():
            self._welcomed.set_exception(ConnectionError(reason))
        lost = set(self._streams.values())
        self._streams.clear()
        for stream in lost:
            stream.fail(ReplicaLost(f"the connection to replica {self.info.id} is gone: {reason}"))

    def _step(self, deltas: tuple[Delta, ...]) -> None:
        batches: dict[Stream, list[Delta]] = {}
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue
            if delta.finish is not None:
                del self._streams[delta.request_id]
                stream.open_ids.discard(delta.request_id)
            if stream.alone:
                stream.put((delta,))
            else:
                batches.setdefault(stream, []).append(delta)
        for stream, batch in batches.items():
            stream.put(tuple(batch))


class EngineLinks:
    """The links of one ingress replica, dialled when first needed."""

    def __init__(self, name: str, *, secret: str) -> None:
        self._name, self._secret = name, secret
        self._links: dict[str, EngineLink] = {}
        self._dials: dict[str, asyncio.Task[EngineLink]] = {}
        self._closed = False

    async def get(self, info: ReplicaInfo) -> EngineLink:
        """The open link to `info`; many callers share one dial. Raises ReplicaLost if it cannot be reached."""
        link = self._links.get(info.id)
        if link is not None and link.is_open:
            return link
        if self._closed:
            raise ReplicaLost("this ingress ends")
        task = self._dials.get(info.id)
        if task is None:
            task = asyncio.create_task(self._dial(info), name=f"dial {info.id}")
            self._dials[info.id] = task
            task.add_done_callback(lambda t: self._dialled(info.id, t))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self._closed:  # the dial was given up, not whoever waits for it
                raise ReplicaLost("this ingress ends") from None
            raise

    @property
    def open_links(self) -> tuple[EngineLink, ...]:
        """All links that stand."""
        return tuple(link for link in self._links.values() if link.is_open)

    async def close(self) -> None:
        """All connections are closed and all dials have ended."""
        self._closed = True
        dials = list(self._dials.values())
        for task in dials:
            task.cancel()
        await asyncio.gather(*dials, return_exceptions=True)
        for link in self._links.values():
            link.close("the ingress ends")
        self._links.clear()

    async def _dial(self, info: ReplicaInfo) -> EngineLink:
        link = EngineLink(info)
        await link.open(secret=self._secret, name=self._name)
        return link

    def _dialled(self, replica_id: str, task: asyncio.Task[EngineLink]) -> None:
        del self._dials[replica_id]
        for gone in [i for i, link in self._links.items() if not link.is_open]:
            del self._links[gone]
        if not task.cancelled() and task.exception() is None:  # else whoever waits has been told
            self._links[replica_id] = task.result()
