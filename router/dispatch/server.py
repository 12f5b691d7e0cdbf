"""The asyncio shell of the dispatcher: ingress replicas dial it, and it watches every registered replica."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from random import Random
from time import monotonic

from router.dispatch.answers import KeptAnswers, Told
from router.dispatch.dispatcher import Dispatcher, DispatcherConfig, Reply
from router.dispatch.histories import KeptHistories
from router.dispatch.histories import Told as ToldOfRounds
from router.dispatch.lease import (
    DISPATCH_CODEC,
    Acquire,
    AddNode,
    AskActivity,
    AskPages,
    AskStory,
    Cancel,
    Claim,
    Ended,
    FrontPage,
    FrontPages,
    Keep,
    NodeAnswer,
    RemoveNode,
    ReplicaTable,
    Reregister,
    Settle,
    Story,
)
from router.dispatch.ledger import Ledger
from router.dispatch.observer import Observer
from router.dispatch.rounds import BeginRound, CancelRound, EndRound, HoldRound
from router.dispatch.scaling import FleetLoad
from router.foreign.node import NodeSpec
from router.foreign.watch import LOOK_SECONDS, ForeignNodes
from router.qos.config import QosConfig
from router.slices import in_slices
from workers.api.channel import Channel, Listener, listen
from workers.api.errors import NodeFailed
from workers.api.ordering import ServiceReport
from workers.api.replica import CacheNews, LoadReport, ReplicaInfo

TICK_SECONDS = 0.1
TABLE_SECONDS = 0.5
GIVE_UP_SECONDS = 10.0  # a registered replica that cannot be reached for so long is dropped

log = logging.getLogger("echelon.dispatcher")


@dataclass(slots=True)
class _Registration:
    info: ReplicaInfo
    observer: Observer
    speed: float | None
    draining: bool = False
    retiring: bool = False  # an operator wants it gone


@dataclass(frozen=True, slots=True)
class Orders:
    """What a replica's supervisor hears each time that it announces the replica."""

    replace: str | None = None  # why it is to end now
    retire: bool = False  # it is to end as soon as its leases have
    load: FleetLoad = FleetLoad()  # of all replicas of its model


class DispatcherServer:
    """Listens for ingress replicas and keeps the table true. Everything runs in one event loop."""

    def __init__(
        self,
        config: DispatcherConfig,
        *,
        secret: str,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "dispatcher",
        rng: Random | None = None,
    ) -> None:
        self._secret, self._host, self._port, self._name = secret, host, port, name
        self.dispatcher = Dispatcher(config, clock=monotonic, rng=rng or Random())
        self._config = config
        self.nodes = ForeignNodes(self)
        self._answers = KeptAnswers(monotonic, config.orphan_grace)
        self._histories = KeptHistories(monotonic, config.orphan_grace)
        self._registered: dict[str, _Registration] = {}
        self._ingresses: dict[str, Channel] = {}
        self._pages: dict[str, bytes] = {}  # by ingress
        self._channels: set[Channel] = set()
        self._listener: Listener | None = None
        self._timer: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._adding: set[asyncio.Task[None]] = set()
        self._looks: set[asyncio.Task[None]] = set()
        self._table_at = 0.0

    async def start(self) -> tuple[str, int]:
        """Listen; the address that ingress replicas dial. Raises OSError if the port is taken."""
        self._listener = await listen(self._host, self._port, codec=DISPATCH_CODEC, secret=self._secret, handler=self)
        self._timer = asyncio.create_task(self._tick(), name="dispatcher tick")
        for spec in self._config.nodes:
            _start(self._add_first_node(spec), self._adding)
        return self._listener.host, self._listener.port

    async def close(self) -> None:
        """All connections are closed and all tasks have ended. Streams go on without us."""
        if self._listener is not None:
            await self._listener.close()
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        for task in (*self._adding, *self._looks):
            task.cancel()
        await asyncio.gather(*self._adding, *self._looks, return_exceptions=True)
        await self.nodes.close()
        observers = [r.observer for r in self._registered.values()]
        self._registered.clear()
        await asyncio.gather(*(o.close() for o in observers), *self._ending)
        for channel in tuple(self._channels):
            channel.close("the dispatcher ends")

    # for the actor around it

    def register(self, info: ReplicaInfo, speed: float | None = None) -> Orders:
        """`info` gets leases once it answers; it is dialled until then. Registering it again changes nothing.

        `speed` (prefill tokens a second) is believed until it was measured. The answer is for whoever owns the replica.
        """
        known = self._registered.get(info.id)
        if known is not None:
            return Orders(self.dispatcher.hopeless(info.id), known.retiring, self.dispatcher.fleet_load(info.model))
        observer = Observer(
            info, secret=self._secret, name=f"observer/{self._name}", watcher=self, patience=GIVE_UP_SECONDS
        )
        self._registered[info.id] = _Registration(info, observer, speed)
        return Orders(load=self.dispatcher.fleet_load(info.model))

    def unregister(self, replica_id: str, reason: str = "unregistered", *, died: bool = False) -> None:
        """`replica_id` is gone at once; leases on it are lost and will be replayed. Unknown ids are left alone.

        `died` says that it broke: a request that sees this happen again and again is taken for poison.
        """
        registration = self._registered.pop(replica_id, None)
        if registration is None:
            return
        _start(registration.observer.close(), self._ending)
        self._answer(self.dispatcher.replica_down(replica_id, reason, died=died))
        self._broadcast()

    def drain(self, replica_id: str) -> int:
        """`replica_id` gets no new leases; how many it still has (call again until it is 0)."""
        if replica_id in self._registered:
            self._registered[replica_id].draining = True
        return self.dispatcher.drain(replica_id)

    def retire(self, replica_id: str) -> bool:
        """`replica_id` is drained, and its supervisor told to end it then. False if nobody registered it."""
        if replica_id not in self._registered:
            return False
        self.drain(replica_id)
        self._registered[replica_id].retiring = True
        self._broadcast()
        return True

    @property
    def client_names(self) -> tuple[str, ...]:
        """Those who may ask for leases."""
        return tuple(self._ingresses)

    def status(self) -> ReplicaTable:
        """The table as ingress replicas see it."""
        d = self.dispatcher
        return ReplicaTable(d.rows(), d.waiting, d.waiting_by_model, d.tiers(), d.work(), self._histories.counts)

    def reload(self, qos: QosConfig, model: str | None = None) -> None:
        """`qos` holds from now on, for what waits too: for `model` alone, or for all that have none of their own."""
        of = "" if model is None else f" of {model}"
        log.info("QoS configuration%s: %d tiers, %d accounts", of, len(qos.tiers), len(qos.accounts))
        self._answer(self.dispatcher.reload(qos, model))

    def ledger(self) -> Ledger:
        """The books of the dispatcher."""
        return self.dispatcher.ledger()

    @property
    def registered(self) -> tuple[str, ...]:
        """Ids of all registrations that stand, reachable or not."""
        return tuple(self._registered)

    # Watcher

    def replica_seen(self, replica_id: str) -> None:  # noqa: D102
        registration = self._registered.get(replica_id)
        if registration is None:
            return
        replies = self.dispatcher.replica_up(registration.info, registration.speed)
        if registration.draining:
            self.dispatcher.drain(replica_id)
        log.info("replica %s of %s is up", replica_id, registration.info.model)
        self._answer(replies)
        self._broadcast()

    def replica_load(self, replica_id: str, load: LoadReport) -> None:  # noqa: D102
        self._answer(self.dispatcher.load(replica_id, load))

    def replica_cache(self, replica_id: str, news: CacheNews) -> None:  # noqa: D102
        self.dispatcher.cache(replica_id, news)

    def replica_service(self, replica_id: str, report: ServiceReport) -> None:  # noqa: D102
        self._answer(self.dispatcher.service(replica_id, report))

    def replica_canary(self, replica_id: str, fault: str | None) -> None:  # noqa: D102
        if fault is not None:
            log.error("replica %s failed its canary and gets no leases: %s", replica_id, fault)
        self._answer(self.dispatcher.canary(replica_id, well=fault is None))

    def replica_unseen(self, replica_id: str, reason: str) -> None:  # noqa: D102
        log.warning("replica %s is down: %s", replica_id, reason)
        self._answer(self.dispatcher.replica_down(replica_id, reason))
        self._broadcast()

    def replica_given_up(self, replica_id: str, reason: str) -> None:  # noqa: D102
        log.warning("replica %s is dropped: %s", replica_id, reason)
        self._registered.pop(replica_id, None)  # its observer has ended by itself
        self._answer(self.dispatcher.replica_down(replica_id, reason))
        self._broadcast()

    # NodeTable

    def node_up(self, info: ReplicaInfo, speed: float | None) -> None:  # noqa: D102
        self._answer(self.dispatcher.replica_up(info, speed))

    def node_health(self, replica_id: str, *, well: bool) -> None:  # noqa: D102
        self._answer(self.dispatcher.canary(replica_id, well=well))

    def node_down(self, replica_id: str, reason: str) -> None:  # noqa: D102
        self._answer(self.dispatcher.replica_down(replica_id, reason, died=False))

    async def add_node(self, spec: NodeSpec) -> None:
        """`spec` gets leases that foreign servers may have. Raises NodeFailed when it cannot be asked."""
        await self.nodes.add(spec)
        self._broadcast()

    def remove_node(self, url: str) -> bool:
        """`url` gets none any more; streams from there go on. False if it was not known."""
        known = self.nodes.remove(url)
        self._broadcast()
        return known

    # workers.api.channel.Handler

    def opened(self, channel: Channel) -> None:  # noqa: D102
        self._channels.add(channel)
        self._ingresses[channel.peer] = channel
        channel.send(self.status())

    def received(self, channel: Channel, message: object) -> None:  # noqa: D102
        match message:
            case Acquire():
                answer = self.dispatcher.acquire(channel.peer, message)
                self._answer(self.dispatcher.shed())
                if answer is not None:
                    channel.send(answer)
            case Settle():
                self._answer(self.dispatcher.settle(message))
            case Cancel():
                self._answer(self.dispatcher.cancel(message.lease_id))
            case Reregister():
                self._answer(self.dispatcher.reregister(channel.peer, message))
            case FrontPage():
                self._pages[channel.peer] = message.page
            case Claim():
                self._tell(self._answers.claim(channel.peer, message))
            case Keep():
                self._tell(self._answers.keep(channel.peer, message))
            case BeginRound():
                self._tell(self._histories.begin(channel.peer, message))
            case EndRound():
                self._tell(self._histories.end(channel.peer, message))
            case HoldRound():
                self._tell(self._histories.hold(channel.peer, message))
            case CancelRound():
                self._tell(self._histories.cancel(channel.peer, message))
            case Ended():
                self.dispatcher.stories.ended(message)
            case AskStory():
                story = self.dispatcher.story(message.owner, message.request_id)
                channel.send(Story(message.number, b"" if story is None else json.dumps(story).encode()))
            case AskActivity():
                if message.owner is None:
                    _start(self._tell_activity(channel, message.number), self._looks)
                else:
                    standing = self.dispatcher.standing(message.owner, message.tier)
                    channel.send(Story(message.number, json.dumps(standing).encode()))
            case AddNode():
                _start(self._add_node(channel, message), self._adding)
            case RemoveNode():
                known = self.remove_node(message.url)
                channel.send(NodeAnswer(message.number, "" if known else "there is no such node"))
            case AskPages():
                others = tuple((name, page) for name, page in self._pages.items() if name != channel.peer)
                channel.send(FrontPages(message.number, others))
            case _:
                channel.close(f"an ingress does not send {type(message).__name__}")

    def closed(self, channel: Channel, reason: str) -> None:  # noqa: D102
        self._channels.discard(channel)
        if self._ingresses.get(channel.peer) is channel:
            log.info("ingress %s is gone: %s", channel.peer, reason)
            del self._ingresses[channel.peer]
            self._pages.pop(channel.peer, None)
            self._answers.client_gone(channel.peer)
            self._histories.client_gone(channel.peer)
            self._answer(self.dispatcher.client_gone(channel.peer))

    # inside

    async def _tell_activity(self, channel: Channel, number: int) -> None:
        activity = await in_slices(self.dispatcher.activity())
        await asyncio.sleep(0)
        channel.send(Story(number, json.dumps(activity).encode()))

    async def _add_node(self, channel: Channel, message: AddNode) -> None:
        if not message.number and message.url in self.nodes.urls:
            return  # another ingress remembered it, too
        fault = ""
        try:
            await self.add_node(NodeSpec(message.url, message.models, message.speed, message.key))
        except NodeFailed as e:
            fault = str(e)
        if message.number:
            channel.send(NodeAnswer(message.number, fault))

    async def _add_first_node(self, spec: NodeSpec) -> None:
        """One of the configuration: it may come up later than we do."""
        while True:
            try:
                await self.add_node(spec)
                return
            except NodeFailed as e:
                log.warning("node %s %s", spec.url, e)
                await asyncio.sleep(LOOK_SECONDS)

    def _answer(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            channel = self._ingresses.get(reply.client)
            if channel is not None:  # else it re-registers when it comes back, and learns it then
                channel.send(reply.message)

    def _tell(self, told: Told | ToldOfRounds) -> None:
        for client, message in told:
            channel = self._ingresses.get(client)
            if channel is not None:
                channel.send(message)

    def _broadcast(self) -> None:
        table = self.status()
        self._table_at = monotonic()
        frame = DISPATCH_CODEC.encode(table)
        for channel in self._ingresses.values():
            channel.send_frame(frame)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._answer(self.dispatcher.tick())
            self._tell(self._answers.tick())
            self._tell(self._histories.tick())
            for replica_id, sync in self.dispatcher.service_syncs():
                self._registered[replica_id].observer.send_sync(sync)
            for replica_id in self.dispatcher.canaries():
                self._registered[replica_id].observer.send_canary()
            if monotonic() - self._table_at >= TABLE_SECONDS:
                self._broadcast()


def _start(work: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
