"""The dispatcher's shell and the ingress side of it, over loopback sockets."""

from __future__ import annotations

import asyncio

import pytest

from router.dispatch import observer, server
from router.dispatch.client import DispatcherClient
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.lease import DISPATCH_CODEC, Acquire, Granted, Outcome, ReplicaState, Settle
from workers.api.channel import Channel, Listener, listen
from workers.api.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NoReplica, Overloaded
from workers.api.replica import ReplicaInfo

from .fakes import MODEL, SECRET, Cluster, FakeEngine, until


def ask(lease_id: str, **rest: object) -> Acquire:
    fields: dict[str, object] = {"model": MODEL, "prompt_tokens": 4, "max_tokens": 8, **rest}
    return Acquire(lease_id=lease_id, **fields)  # type: ignore[arg-type]


async def test_table_reaches_the_ingress() -> None:
    async with Cluster() as cluster:
        await until(lambda: len(cluster.client.rows) == 2)
        await until(lambda: all(r.load.step > 0 for r in cluster.client.rows))
        assert {r.info.id for r in cluster.client.rows} == {"r0", "r1"}
        assert {r.state for r in cluster.client.rows} == {ReplicaState.READY}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "nobody's"}, ModelNotFound),
        ({"prompt_tokens": 5000}, ContextLengthExceeded),
        ({"choices": 9}, InvalidRequest),
    ],
)
async def test_refusals_are_errors_of_the_tree(fields: dict[str, object], error: type[Exception]) -> None:
    async with Cluster() as cluster:
        with pytest.raises(error):
            await cluster.client.acquire(ask("1", **fields))
        assert cluster.server.ledger().balanced


async def test_full_queue_is_overloaded_with_retry_after() -> None:
    async with Cluster(1, config=DispatcherConfig(max_waiting=1)) as cluster:
        await cluster.client.acquire(ask("1", choices=8))
        waiter = asyncio.create_task(cluster.client.acquire(ask("2")))
        await until(lambda: cluster.server.ledger().waiting == 1)
        with pytest.raises(Overloaded) as caught:
            await cluster.client.acquire(ask("3"))
        assert caught.value.retry_after >= 1.0
        assert cluster.client.settle(Settle("1", Outcome.COMPLETED))
        await waiter
        assert cluster.client.settle(Settle("2", Outcome.COMPLETED))
        assert not cluster.client.settle(Settle("2", Outcome.COMPLETED))
        await until(lambda: cluster.server.ledger().settled == 2)
        assert cluster.server.ledger().late == 0


async def test_unregistered_replica_comes_no_more_and_engine_loses_its_observer() -> None:
    async with Cluster() as cluster:
        cluster.server.unregister("r0")
        cluster.server.unregister("r0")
        assert {r.info.id for r in cluster.server.status().rows} == {"r1"}
        await until(lambda: not cluster.engines[0].channels)
        assert cluster.server.registered == ("r1",)


async def test_dead_replica_is_down_at_once_and_back_when_it_answers_again() -> None:
    async with Cluster(1) as cluster:
        engine = cluster.engines[0]
        for channel in list(engine.channels):
            channel.close("a hiccup")
        await until(lambda: not cluster.server.status().rows)
        await until(lambda: len(cluster.server.status().rows) == 1)
        assert cluster.server.registered == ("r0",)


async def test_draining_outlives_a_reconnect() -> None:
    async with Cluster(1) as cluster:
        assert cluster.server.drain("r0") == 0
        for channel in list(cluster.engines[0].channels):
            channel.close("a hiccup")
        await until(lambda: not cluster.server.status().rows)
        await until(lambda: len(cluster.server.status().rows) == 1)
        assert cluster.server.status().rows[0].state is ReplicaState.DRAINING


async def test_the_supervisor_hears_that_its_replica_is_to_retire() -> None:
    async with Cluster(2) as cluster:
        info = cluster.engines[0].info
        assert not cluster.server.register(info).retire
        assert cluster.server.retire("r0")
        assert cluster.server.register(info).retire
        assert not cluster.server.register(cluster.engines[1].info).retire
        assert not cluster.server.retire("nobody")
        states = {row.info.id: row.state for row in cluster.server.status().rows}
        assert states == {"r0": ReplicaState.DRAINING, "r1": ReplicaState.READY}


async def test_unreachable_replica_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GIVE_UP_SECONDS", 0.1)
    monkeypatch.setattr(observer, "_LAST_BACKOFF", 0.05)
    async with Cluster(1) as cluster:
        gone = FakeEngine("gone")
        info = await gone.start()
        await gone.kill()
        cluster.server.register(info)
        await until(lambda: cluster.server.registered == ("r0",))
        assert len(cluster.server.status().rows) == 1


async def test_another_replica_behind_the_address_is_dropped() -> None:
    async with Cluster(1) as cluster:
        real = cluster.engines[0].info
        cluster.server.register(ReplicaInfo("old", MODEL, real.host, real.port, 4096, 8, 1024, 16))
        await until(lambda: cluster.server.registered == ("r0",))


async def test_a_wrong_secret_gets_nothing() -> None:
    async with Cluster(1) as cluster:
        spy = DispatcherClient("spy", secret="wrong", locate=cluster._locate, patience=0.2)
        spy.start()
        with pytest.raises(NoReplica):
            await spy.acquire(ask("1"))
        await spy.close()
        assert cluster.server.ledger().acquired == 0


class SlowDispatcher:
    """Answers when told; records what it got."""

    def __init__(self) -> None:
        self.got: list[object] = []
        self.channel: Channel | None = None

    def opened(self, channel: Channel) -> None:
        self.channel = channel

    def received(self, channel: Channel, message: object) -> None:
        self.got.append(message)

    def closed(self, channel: Channel, reason: str) -> None:
        self.channel = None

    def grant(self, lease_id: str) -> None:
        assert self.channel is not None
        self.channel.send(Granted(lease_id, ReplicaInfo("r", MODEL, "h", 1, 4096, 8, 100, 16), 0.0, 0.0))

    @property
    def told(self) -> list[str]:
        return [type(m).__name__ for m in self.got]


async def test_a_grant_that_comes_after_the_waiter_left_is_settled() -> None:
    slow = SlowDispatcher()
    listener: Listener = await listen("127.0.0.1", 0, codec=DISPATCH_CODEC, secret=SECRET, handler=slow)

    async def locate() -> tuple[str, int]:
        return "127.0.0.1", listener.port

    client = DispatcherClient("i", secret=SECRET, locate=locate)
    client.start()
    waiter = asyncio.create_task(client.acquire(ask("1")))
    await until(lambda: "Acquire" in slow.told or "Reregister" in slow.told)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await until(lambda: "Cancel" in slow.told)
    slow.grant("1")
    await until(lambda: slow.told[-1] == "Settle")
    assert client.held == 0

    # granted and cancelled in the same turn of the loop: the waiter wakes with the grant in its hands
    await until(lambda: client.connected)
    second = asyncio.create_task(client.acquire(ask("2")))
    await until(lambda: ask("2") in slow.got)
    client._granted(Granted("2", ReplicaInfo("r", MODEL, "h", 1, 4096, 8, 100, 16), 0.0, 0.0))
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await until(lambda: slow.told.count("Settle") == 2)
    assert client.held == 0
    await client.close()
    await listener.close()
    await until(lambda: slow.channel is None)


async def test_settlements_made_while_the_dispatcher_is_away_arrive_later() -> None:
    async with Cluster(1) as cluster:
        await cluster.client.acquire(ask("1"))
        await cluster.stop_dispatcher()
        assert cluster.client.settle(Settle("1", Outcome.COMPLETED))
        await cluster.start_dispatcher()
        await until(lambda: cluster.client.connected)
        await cluster.client.acquire(ask("2"))
        ledger = cluster.server.ledger()
        assert (ledger.held, ledger.late) == (1, 1)  # a new dispatcher never knew the first
        cluster.client.settle(Settle("2", Outcome.COMPLETED))
        await until(lambda: cluster.server.ledger().held == 0)
