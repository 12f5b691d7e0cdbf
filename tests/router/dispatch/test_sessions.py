"""Sessions end to end over loopback sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from router.dispatch.lease import Settle
from router.engine_link import EngineLinks
from router.generation import Batch, GenerationRequest
from router.sessions import PROGRESS_TOKENS
from workers.api import wire
from workers.api.errors import EngineFault, NoReplica, ReplicaLost, WireError
from workers.api.replica import ReplicaInfo
from workers.api.request import FinishReason

from .fakes import Cluster, Collected, FakeEngine, expected_tokens, generation, until


async def collect(
    cluster: Cluster, request: GenerationRequest, into: Collected | None = None, *, stop_after: int = 1 << 30
) -> Collected:
    got = into or Collected()

    def take(batch: Batch) -> bool:
        got.add(batch)
        return got.batches < stop_after

    await cluster.sessions.generate(request, take)
    return got


def record_settles(cluster: Cluster) -> list[Settle]:
    """Every settlement that really ended a lease, as it goes to the dispatcher."""
    settles: list[Settle] = []
    original: Callable[[Settle], bool] = cluster.client.settle

    def settle(settled: Settle) -> bool:
        settles.append(settled)
        return original(settled)

    cluster.client.settle = settle  # type: ignore[method-assign]
    return settles


async def books_closed(cluster: Cluster) -> None:
    """Nothing is held or waited for anywhere, and the books balance."""
    await until(lambda: cluster.server.ledger().held == 0)
    ledger = cluster.server.ledger()
    assert ledger.balanced
    assert ledger.waiting == 0
    assert cluster.client.held == 0
    assert cluster.sessions.running == 0


async def test_exact_tokens_and_one_settle() -> None:
    async with Cluster() as cluster:
        settles = record_settles(cluster)
        got = await collect(cluster, generation("a", max_tokens=20))
        assert got.tokens == {0: expected_tokens((1, 2, 3), 20)}
        assert got.finish == {0: FinishReason.LENGTH}
        assert got.batches == 21  # accepted, then one a step
        await books_closed(cluster)
        assert [(s.outcome, s.output_tokens, s.prefill_tokens, s.decode_tokens) for s in settles] == [
            ("completed", 20, 3, 20)
        ]


async def test_first_batch_is_empty_and_says_accepted() -> None:
    async with Cluster(1) as cluster:
        cluster.engines[0].hold = True
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a"), got))
        await until(lambda: got.batches == 1)
        assert not got.tokens
        assert cluster.server.ledger().held == 1
        cluster.engines[0].hold = False
        await task
        await books_closed(cluster)


async def test_three_choices_share_a_lease() -> None:
    async with Cluster() as cluster:
        settles = record_settles(cluster)
        got = await collect(cluster, generation("a", n=3))
        assert got.tokens == {i: expected_tokens((1, 2, 3), 20, i) for i in range(3)}
        assert len(got.finish) == 3
        assert got.batches == 21
        assert len(settles) == 1
        await books_closed(cluster)


async def test_stop_id_ends_a_choice() -> None:
    stop = expected_tokens((1, 2, 3), 6)[-1]
    async with Cluster() as cluster:
        got = await collect(cluster, generation("a", stop_ids=(stop,)))
        assert got.tokens[0] == expected_tokens((1, 2, 3), 6)
        assert got.finish == {0: FinishReason.STOP}


async def test_many_streams_at_once_queue_for_slots() -> None:
    async with Cluster() as cluster:
        requests = [generation(f"q{i}", (i, i + 1), max_tokens=10) for i in range(60)]
        results = await asyncio.gather(*(collect(cluster, r) for r in requests))
        for request, got in zip(requests, results, strict=True):
            assert got.tokens[0] == expected_tokens(request.prompt_ids, 10)
        assert all(len(e.submitted) > 0 for e in cluster.engines)
        await books_closed(cluster)
        assert cluster.server.ledger().settled == 60


@pytest.mark.parametrize("batches", [1, 3])
async def test_enough_aborts_and_settles_once(batches: int) -> None:
    async with Cluster() as cluster:
        settles = record_settles(cluster)
        got = await collect(cluster, generation("a", n=2, max_tokens=100_000), stop_after=batches)
        assert got.batches == batches
        await until(lambda: not cluster.engine_of and any(e.aborted for e in cluster.engines))
        assert sorted(i for e in cluster.engines for i in e.aborted) == ["a/0#0", "a/1#0"]
        assert [s.outcome for s in settles] == ["aborted"]
        assert settles[0].output_tokens == 2 * (batches - 1)
        await books_closed(cluster)


async def test_cancelled_reader_aborts() -> None:
    async with Cluster() as cluster:
        settles = record_settles(cluster)
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=100_000), got))
        await until(lambda: got.batches > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not cluster.engine_of)
        await books_closed(cluster)
        assert len(settles) == 1


async def test_cancelled_while_waiting_gives_its_place_up() -> None:
    async with Cluster(1) as cluster:
        cluster.engines[0].hold = True
        hog = asyncio.create_task(collect(cluster, generation("hog", n=8)))
        await until(lambda: len(cluster.engine_of) == 8)
        waiter = asyncio.create_task(collect(cluster, generation("w")))
        behind = asyncio.create_task(collect(cluster, generation("b")))
        await until(lambda: cluster.server.ledger().waiting == 2)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        cluster.engines[0].hold = False
        await hog
        assert (await behind).tokens[0] == expected_tokens((1, 2, 3), 20)
        assert not [r for r in cluster.engines[0].submitted if r.id.startswith("w/")]
        await books_closed(cluster)
        assert cluster.server.ledger().cancelled == 1


async def victim_of(cluster: Cluster, prefix: str) -> FakeEngine:
    await until(lambda: any(i.startswith(prefix) for i in cluster.engine_of))
    return next(e for i, e in cluster.engine_of.items() if i.startswith(prefix))


async def test_replica_killed_mid_stream_continues_elsewhere() -> None:
    async with Cluster() as cluster:
        settles = record_settles(cluster)
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", n=3, max_tokens=200), got))
        await until(lambda: got.batches > 20)
        await (await victim_of(cluster, "a/")).kill()
        await task
        assert got.tokens == {i: expected_tokens((1, 2, 3), 200, i) for i in range(3)}
        assert set(got.finish.values()) == {FinishReason.LENGTH}
        replayed = [r for e in cluster.engines for r in e.submitted if r.id.endswith("#1")]
        assert len(replayed) == 3
        assert all(0 < len(r.resumed_ids) < 200 and r.sampling.seed == 7 for r in replayed)
        assert [s.outcome for s in settles] == ["lost", "completed"]
        assert sum(s.output_tokens for s in settles) == 600
        await books_closed(cluster)
        ledger = cluster.server.ledger()
        assert (ledger.acquired, ledger.lost + ledger.settled) == (2, 2)


async def test_only_unfinished_choices_are_replayed() -> None:
    async with Cluster() as cluster:
        request = generation("a", n=2, max_tokens=200)
        short = request.samplings[0].__class__(max_tokens=5, choice=0, seed=7)
        request = GenerationRequest("a", request.model, request.prompt_ids, (short, request.samplings[1]))
        got = Collected()
        task = asyncio.create_task(collect(cluster, request, got))
        await until(lambda: 0 in got.finish and len(got.tokens[1]) > 10)
        await (await victim_of(cluster, "a/1")).kill()
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 5), 1: expected_tokens((1, 2, 3), 200, 1)}
        assert [r.id for e in cluster.engines for r in e.submitted if "#1" in r.id] == ["a/1#1"]


async def test_taken_out_by_the_dispatcher_is_replayed_though_the_link_stands() -> None:
    async with Cluster() as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=200), got))
        await until(lambda: got.batches > 10)
        victim = await victim_of(cluster, "a/")
        cluster.server.unregister(victim.id, "its rank 1 hangs")
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 200)}
        assert victim.aborted == ["a/0#0"]
        assert cluster.sessions.replays == 1


async def test_a_request_may_be_moved_more_often_than_it_may_fail() -> None:
    """Though it makes no progress between its moves."""
    async with Cluster(1) as cluster:
        cluster.sessions._max_replays, moves = 1, 3
        cluster.engines[0].hold = True
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=50), got))
        for move in range(moves):
            victim = await victim_of(cluster, f"a/0#{move}")
            cluster.engines.append(FakeEngine(f"new{move}"))
            cluster.engines[-1].hold = move + 1 < moves
            cluster.server.register(await cluster.engines[-1].start())
            cluster.server.unregister(victim.id, "drained")
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 50)}
        assert cluster.sessions.replays == moves
        await books_closed(cluster)


async def test_two_deaths_make_poison() -> None:
    async with Cluster(3) as cluster:
        for engine in cluster.engines:
            engine.hold = True
        settles = record_settles(cluster)
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=100_000), got))
        for attempt in range(2):
            await (await victim_of(cluster, f"a/0#{attempt}")).kill()
        with pytest.raises(EngineFault, match="2 replicas died"):
            await task
        assert len(settles) == 2
        await books_closed(cluster)


async def test_a_long_stream_outlives_more_deaths_than_a_fruitless_one_may_see() -> None:
    """Whoever gets on between two deaths died of neither: it was there when a replica died."""
    async with Cluster(6) as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=400), got))
        for attempt in range(5):
            engine = await victim_of(cluster, f"a/0#{attempt}")
            enough = len(got.tokens.get(0, ())) + PROGRESS_TOKENS
            await until(lambda enough=enough: len(got.tokens.get(0, ())) >= enough)
            await engine.kill()
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 400)}
        assert cluster.sessions.replays == 5
        await books_closed(cluster)


async def test_links_that_were_only_cut_are_no_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.sessions.VERDICT_SECONDS", 0.05)
    async with Cluster(3) as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=300), got))
        for attempt in range(2):
            engine = await victim_of(cluster, f"a/0#{attempt}")
            for channel in [c for c in engine.channels if not c.peer.startswith("observer")]:
                channel.close("cut")
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 300)}
        assert cluster.sessions.replays == 2
        await books_closed(cluster)


async def test_an_engine_error_is_tried_once_elsewhere() -> None:
    async with Cluster() as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=200), got))
        await until(lambda: got.batches > 10)
        (await victim_of(cluster, "a/")).fail_with = "a step failed"
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 200)}
        assert all(e.submitted for e in cluster.engines)
        await books_closed(cluster)


async def test_two_engine_errors_are_declared() -> None:
    async with Cluster() as cluster:
        for engine in cluster.engines:
            engine.fail_with = "CUDA went away"
        with pytest.raises(EngineFault, match="CUDA went away"):
            await collect(cluster, generation("a"))
        await books_closed(cluster)


async def test_an_invalid_submit_is_not_carried_around() -> None:
    async with Cluster() as cluster:
        for engine in cluster.engines:
            engine.fail_with = "invalid: token 99 is not in the vocabulary"
        with pytest.raises(EngineFault, match="not in the vocabulary"):
            await collect(cluster, generation("a"))
        assert sum(len(e.submitted) for e in cluster.engines) == 1


async def test_gaps_are_refused_and_duplicates_dropped() -> None:
    async with Cluster() as cluster:
        for engine in cluster.engines:
            engine.repeat = True
        cluster.engines[0].skip_position = True
        cluster.engines[1].skip_position = False
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=50), got))
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 50)}
        await books_closed(cluster)
        assert cluster.sessions.replays == (1 if cluster.engines[0].submitted else 0)


async def test_a_submit_over_the_frame_limit_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster() as cluster:
        await collect(cluster, generation("a", max_tokens=2))
        (link,) = cluster.sessions.links.open_links
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
        with pytest.raises(WireError, match="over 2000"):
            await collect(cluster, replace(generation("b", max_tokens=2), prompt_ids=(70_000,) * 1000))
        assert not link.streams
        await collect(cluster, generation("c", max_tokens=2))
        await books_closed(cluster)


async def test_finished_work_is_not_resubmitted() -> None:
    """The replica dies between its last token and the delta that would say why it ended."""
    stop = expected_tokens((1, 2, 3), 8)[-1]
    async with Cluster(1) as cluster:
        engine = cluster.engines[0]
        original = engine._next

        def without_finish(sequence: object) -> object:
            delta = original(sequence)  # type: ignore[arg-type]
            if delta.finish is None:
                return delta
            engine.hold = True
            return delta.__class__(delta.request_id, delta.position, delta.token_ids)

        engine._next = without_finish  # type: ignore[method-assign, assignment]
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", stop_ids=(stop,)), got))
        await until(lambda: len(got.tokens.get(0, ())) == 8)
        await engine.kill()
        await task
        assert got.tokens[0] == expected_tokens((1, 2, 3), 8)
        assert got.finish == {0: FinishReason.STOP}
        await books_closed(cluster)


@pytest.mark.parametrize("error", [EngineFault("too far behind"), RuntimeError("a bug")])
async def test_a_sink_that_raises_ends_its_own_stream_only(error: Exception) -> None:
    async with Cluster(1) as cluster:
        settles = record_settles(cluster)
        other = asyncio.create_task(collect(cluster, generation("b", max_tokens=200)))

        def take(batch: Batch) -> bool:
            if batch:
                raise error
            return True

        with pytest.raises(type(error), match=str(error)):
            await cluster.sessions.generate(generation("a", max_tokens=100_000), take)
        await until(lambda: cluster.engines[0].aborted == ["a/0#0"])
        assert [s.outcome for s in settles] == ["failed" if isinstance(error, EngineFault) else "aborted"]
        assert (await other).tokens == {0: expected_tokens((1, 2, 3), 200)}
        assert cluster.sessions.replays == 0
        await books_closed(cluster)


async def test_dispatcher_restart_leaves_streams_alone() -> None:
    async with Cluster() as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=400), got))
        await until(lambda: got.batches > 5)
        await cluster.stop_dispatcher()
        seen = got.batches
        late = asyncio.create_task(collect(cluster, generation("late", max_tokens=5)))
        await until(lambda: got.batches > seen + 10)
        assert not late.done()
        await cluster.start_dispatcher()
        await late
        await until(lambda: cluster.server.ledger().held == 1)  # "a", re-registered
        assert not task.done()
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 400)}
        assert cluster.sessions.replays == 0
        await books_closed(cluster)
        assert cluster.server.ledger().settled == 2


async def test_waiting_requests_keep_their_order_over_a_restart() -> None:
    async with Cluster(1) as cluster:
        engine = cluster.engines[0]
        engine.hold = True
        hog = asyncio.create_task(collect(cluster, generation("hog", n=8)))
        await until(lambda: len(engine.sequences) == 8)
        waiters = []
        for i in range(5):
            waiters.append(asyncio.create_task(collect(cluster, generation(f"w{i}", n=8))))
            await until(lambda: cluster.server.ledger().waiting == len(waiters))
        await cluster.stop_dispatcher()
        await cluster.start_dispatcher()
        await until(lambda: cluster.server.ledger().waiting == 5)
        engine.hold = False
        await asyncio.gather(hog, *waiters)
        order = list(dict.fromkeys(r.id.split("/")[0] for r in engine.submitted))
        assert order == ["hog", "w0", "w1", "w2", "w3", "w4"]
        await books_closed(cluster)


async def test_no_replica_is_a_clear_refusal() -> None:
    async with Cluster(0) as cluster:
        with pytest.raises(NoReplica, match="no replica of demo came up"):
            await collect(cluster, generation("a"))
        await books_closed(cluster)


async def test_no_dispatcher_is_a_clear_refusal() -> None:
    async with Cluster(1) as cluster:
        cluster.client._patience = 0.2
        await cluster.stop_dispatcher()
        with pytest.raises(NoReplica, match="dispatcher is not reachable"):
            await collect(cluster, generation("a"))


async def test_the_only_replica_dies_and_comes_back_under_a_new_id() -> None:
    async with Cluster(1) as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=200), got))
        await until(lambda: got.batches > 5)
        await cluster.engines[0].kill()
        cluster.engines.append(FakeEngine("r-new"))
        cluster.server.register(await cluster.engines[1].start())
        await task
        assert got.tokens == {0: expected_tokens((1, 2, 3), 200)}
        await books_closed(cluster)


async def test_closing_sessions_fails_running_streams() -> None:
    async with Cluster() as cluster:
        got = Collected()
        task = asyncio.create_task(collect(cluster, generation("a", max_tokens=100_000), got))
        await until(lambda: got.batches > 5)
        await cluster.sessions.close()
        with pytest.raises((ReplicaLost, NoReplica)):
            await task


async def test_closing_links_fails_whoever_waits_for_a_dial() -> None:
    """The dial is given up, not its waiters: they hear of it as an error, not as if their client had left."""

    def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []
    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    info = ReplicaInfo("r0", "m", *listener.sockets[0].getsockname(), 4096, 8, num_blocks=64, block_size=16)
    links = EngineLinks("ingress-1", secret="s")
    waiting = [asyncio.create_task(links.get(info)) for _ in range(2)]
    await until(lambda: writers)
    waiting[1].cancel()  # one that leaves takes nobody with it
    with pytest.raises(asyncio.CancelledError):
        await waiting[1]
    assert not waiting[0].done()
    await links.close()
    with pytest.raises(ReplicaLost, match="ends"):
        await waiting[0]
    with pytest.raises(ReplicaLost, match="ends"):
        await links.get(info)
    for writer in writers:
        writer.close()
    listener.close()
