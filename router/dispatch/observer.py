"""Watches one registered replica over a connection of its own: load after each step, and its death at once."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from router.dispatch.canary import canary_fault, canary_request
from workers.api.channel import Channel, dial
from workers.api.errors import WireError
from workers.api.ordering import ServiceReport, ServiceSync
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo
from workers.api.wire import ENGINE_CODEC, StepFrame, Submit, Welcome

_FIRST_BACKOFF, _LAST_BACKOFF = 0.05, 1.0  # seconds
_WELCOME_SECONDS = 3.0

log = logging.getLogger("echelon.dispatcher")


class Watcher(Protocol):
    """What an observer tells. Called in the event loop."""

    def replica_seen(self, replica_id: str) -> None:
        """The replica answered with its Welcome."""

    def replica_load(self, replica_id: str, load: LoadReport) -> None:
        """A step report."""

    def replica_cache(self, replica_id: str, news: CacheNews) -> None:
        """What its prefix cache gained and lost."""

    def replica_service(self, replica_id: str, report: ServiceReport) -> None:
        """What it executed for each account."""

    def replica_canary(self, replica_id: str, fault: str | None) -> None:
        """The canary has ended; `fault` says what came instead of its token."""

    def replica_unseen(self, replica_id: str, reason: str) -> None:
        """The connection is gone: so is the replica, until it is seen again."""

    def replica_given_up(self, replica_id: str, reason: str) -> None:
        """It could not be reached for too long; the observer has ended."""


class Observer:
    """Dials `info` again and again until closed, or until `patience` seconds passed without success."""

    def __init__(self, info: ReplicaInfo, *, secret: str, name: str, watcher: Watcher, patience: float) -> None:
        self.info = info
        self._secret, self._name, self._watcher, self._patience = secret, name, watcher, patience
        self._welcomed: asyncio.Future[ReplicaInfo] | None = None
        self._ended: asyncio.Future[str] | None = None
        self._channel: Channel | None = None
        self._canary = ""  # the id of the one that runs
        self._is_up = False
        self._closing = False
        self._task = asyncio.create_task(self._watch(), name=f"observer of {info.id}")

    def send_canary(self) -> None:
        """The replica is asked for one token; `replica_canary` tells of it, unless the connection ends before."""
        if self._channel is not None and self._is_up:
            request = canary_request()
            self._canary = request.id
            self._channel.send(Submit((request,)))

    def send_sync(self, sync: ServiceSync) -> None:
        """The replica is told what the cluster has served; dropped if it is not there."""
        if self._channel is not None and self._is_up:
            self._channel.send(sync)

    async def close(self) -> None:
        """The connection is closed; nothing is told any more."""
        self._closing = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        backoff, last_seen = _FIRST_BACKOFF, loop.time()
        while True:
            try:
                await self._connect_and_stay()
                backoff, last_seen = _FIRST_BACKOFF, loop.time()  # it answered, and is gone again
            except WireError as e:
                log.warning("replica %s: %s", self.info.id, e)
                self._watcher.replica_given_up(self.info.id, str(e))
                return
            except (OSError, TimeoutError) as e:
                if loop.time() - last_seen > self._patience:
                    reason = f"unreachable for {self._patience:g} s: {type(e).__name__}: {e}"
                    self._watcher.replica_given_up(self.info.id, reason)
                    return
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF)

    async def _connect_and_stay(self) -> None:
        loop = asyncio.get_running_loop()
        self._welcomed, self._ended = loop.create_future(), loop.create_future()
        channel = await dial(
            self.info.host, self.info.port, codec=ENGINE_CODEC, secret=self._secret, name=self._name, handler=self
        )
        try:
            either: set[asyncio.Future[Any]] = {self._welcomed, self._ended}
            await asyncio.wait(either, timeout=_WELCOME_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not self._welcomed.done() and not self._ended.done():
                raise TimeoutError(f"no Welcome in {_WELCOME_SECONDS:g} s")
            if not self._welcomed.done():
                raise ConnectionError(self._ended.result())
            if self._welcomed.result().id != self.info.id:
                raise WireError(f"{self.info.host}:{self.info.port} is now {self._welcomed.result().id}")
            await self._ended
        finally:
            channel.close()

    # workers.api.channel.Handler

    def opened(self, channel: Channel) -> None:
        """Wait for the Welcome."""
        self._channel = channel

    def received(self, channel: Channel, message: object) -> None:
        """A Welcome or a step."""
        if isinstance(message, StepFrame):
            if self._is_up:
                self._watcher.replica_load(self.info.id, message.load)
                for delta in message.deltas:
                    if delta.request_id == self._canary and delta.finish is not None:
                        self._canary = ""
                        self._watcher.replica_canary(self.info.id, canary_fault(delta))
        elif isinstance(message, ServiceReport):
            self._watcher.replica_service(self.info.id, message)
        elif isinstance(message, CacheNews):
            self._watcher.replica_cache(self.info.id, message)
        elif isinstance(message, Welcome) and self._welcomed is not None and not self._welcomed.done():
            self._welcomed.set_result(message.info)
            if message.info.id == self.info.id and not self._closing:
                self._is_up = True
                self._watcher.replica_seen(self.info.id)

    def closed(self, channel: Channel, reason: str) -> None:
        """The end of the replica, as far as is known here."""
        if self._is_up:
            self._is_up = False
            if not self._closing:
                self._watcher.replica_unseen(self.info.id, reason)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(reason)
