"""One engine behind one listening socket: what a replica's rank 0 runs.

Two threads. The engine thread steps; the asyncio thread reads and writes frames. They meet once a step: commands go in
by a deque, deltas come out by one `call_soon_threadsafe`. A step that fails ends the server: connections close, and
whoever held leases here replays them elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from workers.api.channel import Channel, Listener, listen
from workers.api.errors import ContextLengthExceeded, EngineFault, RequestError, WireError
from workers.api.grammar import GrammarSpec
from workers.api.ordering import ServiceReport, ServiceSync
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo
from workers.api.request import INVALID, Delta, EngineRequest, FinishReason
from workers.api.wire import ENGINE_CODEC, Abort, StepFrame, Submit, Welcome
from workers.engine.core import Engine

OBSERVER = "observer"  # a peer whose name starts so gets every load, and the prefix cache's news
IDLE_REPORT_SECONDS = 0.5
MOST_NEWS = 4096  # blocks that one report tells of: 32 KiB

log = logging.getLogger("echelon.replica")


class _Observed:
    """An observer is there, and knows nothing yet."""


class EngineServer:
    """Serves `engine`. `info` is complete but for host and port, which `start` fills in."""

    def __init__(self, engine: Engine, info: ReplicaInfo, secret: str) -> None:
        self._engine, self._info, self._secret = engine, info, secret
        self._inbox: deque[tuple[Channel, Submit | Abort | ServiceSync | _Observed | None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._step_began: float | None = None
        # engine thread only
        self._owner: dict[str, Channel] = {}
        self._observed = False
        # asyncio thread only
        self._compiling: dict[str, bool] = {}  # requests whose grammar is; True: aborted meanwhile
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="echelon-grammars")
        self._channels: set[Channel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: Listener | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="frames", daemon=True)

    @property
    def info(self) -> ReplicaInfo:
        """With the real address once `start` has returned."""
        return self._info

    def start(self, host: str, port: int = 0) -> ReplicaInfo:
        """Listen in a thread of its own. Steps run only inside `run`."""
        self._thread.start()
        future = asyncio.run_coroutine_threadsafe(self._listen(host, port), self._loop)
        self._info = future.result()
        return self._info

    async def _listen(self, host: str, port: int) -> ReplicaInfo:
        self._listener = await listen(host, port, codec=ENGINE_CODEC, secret=self._secret, handler=self)
        return replace(self._info, host=host, port=self._listener.port)

    def run(self) -> None:
        """Step until `stop`. Raises what a step raised, after closing every connection."""
        try:
            while not self._stopping:
                self._take_commands()
                if self._engine.has_work:
                    self._step_began = time.monotonic()
                    deltas = self._engine.step()
                    self._step_began = None
                    self._hand_out(deltas)
                elif not (self._inbox or self._calls):
                    self._wake.wait(IDLE_REPORT_SECONDS)
                    self._wake.clear()
                    if not self._inbox:
                        self._hand_out([])
        finally:
            self._loop.call_soon_threadsafe(self._close_all)
            self._thread.join(timeout=5.0)
            if not self._thread.is_alive():
                self._loop.close()

    def between_steps(self, call: Callable[[], None]) -> None:
        """`call` is made in the engine's thread, before the next step. Any thread."""
        self._calls.append(call)
        self._wake.set()

    def stop(self) -> None:
        """Make `run` return after the step under way. Any thread."""
        self._stopping = True
        self._wake.set()

    def step_age(self) -> float:
        """Seconds that the step under way has taken so far; 0 between steps. Any thread."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def sequences(self) -> int:
        """How many it has that have not ended. Any thread."""
        return len(self._owner)

    # engine thread

    def _take_commands(self) -> None:
        rejected: list[Delta] = []
        while self._calls:
            self._calls.popleft()()
        while self._inbox:
            channel, message = self._inbox.popleft()
            if message is None:  # the peer is gone
                for request_id in [i for i, c in self._owner.items() if c is channel]:
                    self._engine.abort(request_id)
            elif isinstance(message, _Observed):
                self._observed = True
                self._engine.tell_cache_anew()
                if self._engine.ordering is not None:
                    self._engine.ordering.greet()
            elif isinstance(message, ServiceSync):
                if self._engine.ordering is not None:
                    self._engine.ordering.sync(message)
            elif isinstance(message, Abort):
                for request_id in message.request_ids:
                    self._engine.abort(request_id)
            else:
                for request in message.requests:
                    rejected += self._submit(request, channel)
        if rejected:
            self._hand_out(rejected)

    def _submit(self, request: EngineRequest, channel: Channel) -> list[Delta]:
        """The request is the engine's; or its last deltas, where that does not take it."""
        ids = request.answer_ids
        if not self._owner.keys().isdisjoint(ids):  # an id is unique for ever: this is a defect of the sender
            self._loop.call_soon_threadsafe(channel.close, f"request id {request.id} is live already")
            return []
        self._owner |= dict.fromkeys(ids, channel)
        try:
            self._engine.submit(request)
        except ContextLengthExceeded as e:
            if request.resumed_ids:  # it came from a replica with more room: here it has all that it can get
                return [Delta(request.id, len(request.resumed_ids), finish=FinishReason.LENGTH)]
            return self._refusal(request, INVALID + str(e))
        except RequestError as e:
            return self._refusal(request, INVALID + str(e))
        except EngineFault:
            raise
        except Exception as e:
            log.exception("request %s was not taken", request.id)  # its failure stays with it
            return self._refusal(request, f"the engine could not take it: {type(e).__name__}")
        return []

    @staticmethod
    def _refusal(request: EngineRequest, error: str) -> list[Delta]:
        start = len(request.resumed_ids)
        return [Delta(name, start, finish=FinishReason.ERROR, error=error) for name in request.answer_ids]

    def _hand_out(self, deltas: list[Delta]) -> None:
        by_channel: dict[Channel, list[Delta]] = {}
        for delta in deltas:
            channel = self._owner[delta.request_id]
            by_channel.setdefault(channel, []).append(delta)
            if delta.finish is not None:
                del self._owner[delta.request_id]
        told: list[CacheNews | ServiceReport] = []
        if self._observed:
            if (news := self._engine.cache_news(MOST_NEWS)) is not None:
                told.append(news)
            ordering = self._engine.ordering
            if ordering is not None and (report := ordering.report(time.monotonic())) is not None:
                told.append(report)
        self._loop.call_soon_threadsafe(self._send, by_channel, self._engine.load(), told)

    # asyncio thread

    def _send(
        self, by_channel: dict[Channel, list[Delta]], load: LoadReport, told: list[CacheNews | ServiceReport]
    ) -> None:
        for channel, deltas in by_channel.items():
            self._send_step(channel, tuple(deltas), load)
        frame = b""
        for channel in self._channels:
            if channel.peer.startswith(OBSERVER):
                if not frame:
                    frame = b"".join(map(ENGINE_CODEC.encode, (*told, StepFrame((), load))))
                channel.send_frame(frame)

    def _send_step(self, channel: Channel, deltas: tuple[Delta, ...], load: LoadReport) -> None:
        """In one frame, or where answers of beam searches, which come whole, do not fit in one, in several."""
        try:
            channel.send(StepFrame(deltas, load))
        except WireError as e:
            if len(deltas) == 1:
                channel.close(str(e))  # else its reader would wait for ever
                return
            half = len(deltas) // 2
            self._send_step(channel, deltas[:half], load)
            self._send_step(channel, deltas[half:], load)

    def opened(self, channel: Channel) -> None:
        """A peer with the secret."""
        self._channels.add(channel)
        channel.send(Welcome(self._info))
        if channel.peer.startswith(OBSERVER):
            self._inbox.append((channel, _Observed()))
            self._wake.set()

    def received(self, channel: Channel, message: Any) -> None:
        """A command for the engine thread."""
        if isinstance(message, Submit) and (specs := self._new_grammars(message)):
            self._compiling |= {r.id: False for r in message.requests}
            task = self._loop.create_task(self._compile_first(channel, message, specs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        if isinstance(message, Abort) and self._compiling:
            self._compiling |= dict.fromkeys(self._compiling.keys() & set(message.request_ids), True)
        if isinstance(message, Submit | Abort | ServiceSync):
            self._inbox.append((channel, message))
            self._wake.set()
        else:
            channel.close(f"a {type(message).__name__} is not for an engine")

    def _new_grammars(self, message: Submit) -> set[GrammarSpec]:
        """Those that have to be compiled."""
        specs = {r.grammar for r in message.requests if r.grammar is not None}
        grammars = self._engine.grammars
        return set() if grammars is None else {spec for spec in specs if not grammars.is_compiled(spec)}

    async def _compile_first(self, channel: Channel, message: Submit, specs: set[GrammarSpec]) -> None:
        """Steps go on meanwhile. What was aborted by then is submitted and aborted: it gets its last delta."""
        assert self._engine.grammars is not None
        for spec in specs:
            await self._loop.run_in_executor(self._compilers, self._engine.grammars.compile, spec)
        aborted = tuple([r.id for r in message.requests if self._compiling.pop(r.id)])
        if channel in self._channels:
            self._inbox.append((channel, message))
            if aborted:
                self._inbox.append((channel, Abort(aborted)))
            self._wake.set()

    def closed(self, channel: Channel, reason: str) -> None:
        """The peer is gone: its sequences are aborted."""
        self._channels.discard(channel)
        log.info("%s is gone: %s", channel.peer, reason)
        self._inbox.append((channel, None))
        self._wake.set()

    def _close_all(self) -> None:
        self._compilers.shutdown(wait=False, cancel_futures=True)
        for channel in list(self._channels):
            channel.close("the engine stopped")
        if self._listener is not None:
            closing = self._loop.create_task(self._listener.close())
            closing.add_done_callback(lambda _: self._loop.call_later(0.2, self._loop.stop))
        else:
            self._loop.call_soon(self._loop.stop)
