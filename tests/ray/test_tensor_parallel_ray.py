"""Two ranks as Ray actors in a placement group: the same tokens as one rank, and a death that everybody notices."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "workers"))  # the demo model's prompts

from demo_reference import COUNT, FOLDER, answers
from demo_requests import Answer, differing, greedy, of_transformers, requests, serve_alone
from tiny import replica
from watching import PATIENCE, await_true

from workers.api.channel import Channel, dial
from workers.api.request import EngineRequest, SamplingParams
from workers.api.wire import ENGINE_CODEC, StepFrame, Submit, Welcome
from workers.rank import Rank

pytestmark = pytest.mark.ray

SECRET = "of this test"


@dataclass
class Client:
    """One connection to rank 0 of a gang."""

    answers: dict[str, Answer] = field(default_factory=dict)
    load: Any = None
    closed_by: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def opened(self, channel: Channel) -> None:
        self.channel = channel

    def received(self, channel: Channel, message: Any) -> None:
        if isinstance(message, StepFrame):
            for delta in message.deltas:
                self.answers[delta.request_id].add(delta)
            self.load = message.load
        else:
            assert isinstance(message, Welcome)
        self.changed.set()

    def closed(self, channel: Channel, reason: str) -> None:
        self.closed_by = reason
        self.changed.set()

    def submit(self, asked: Iterable[EngineRequest]) -> None:
        asked = tuple(asked)
        self.answers |= {one.id: Answer() for one in asked}
        self.channel.send(Submit(asked))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def done(self) -> bool:
        return all(one.finish is not None for one in self.answers.values())


@asynccontextmanager
async def gang_of_two(name: str, **changes: Any) -> AsyncIterator[tuple[Any, Client, Awaitable[str]]]:
    """A running gang of two ranks of the demo model, a client of it, and what its `run` will say."""
    import ray

    from cluster.gang import Gang
    from cluster.placement import rank_bundles

    config = replace(replica(FOLDER, tensor_parallel=2, cache_bytes_cpu=32 << 20, max_num_seqs=64), **changes)
    group = ray.util.placement_group(rank_bundles(config), strategy="PACK")
    gang = Gang(config, group, revision=None, replica_id=name, secret=SECRET, threads=1)
    try:
        async with asyncio.timeout(PATIENCE):
            info = await gang.start()
        run = asyncio.ensure_future(gang.run())
        client = Client()
        await dial(info.host, info.port, codec=ENGINE_CODEC, secret=SECRET, name="test", handler=client)
        yield gang, client, run
    finally:
        gang.kill()
        ray.util.remove_placement_group(group)
    for pid in gang.pids:
        await gone(pid)


async def gone(pid: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while alive(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it ends between opening and reading
        return False


def endless(count: int) -> list[EngineRequest]:
    """Requests that stop at their limit only, far from here."""
    sampling = SamplingParams(max_tokens=1500, temperature=0.0)
    return [replace(greedy(i), sampling=sampling) for i in range(count)]


async def test_two_ranks_answer_as_one_does(running: Any) -> None:
    """All 200 prompts, greedily; 40 of them and the sampled requests alone on one rank."""
    expected = of_transformers(COUNT)
    sampled = [one for one in requests(40) if one.sampling.temperature or one.id.startswith("s")]
    expected |= serve_alone(Rank(replica(FOLDER)).make_engine(), sampled)
    async with gang_of_two("exact") as (gang, client, run):
        client.submit([*sampled, *(greedy(i) for i in range(COUNT))])
        await client.until(client.done)
        assert differing(client.answers, expected) == {}
        client.answers.clear()
        client.submit([greedy(7)])  # out of the prefix cache
        await client.until(client.done)
        assert client.answers["g7"].tokens == answers()[7]
        assert client.answers["g7"].cached_tokens >= len(greedy(7).prompt_ids) - 16
        load = client.load
        assert load.requests.balanced
        assert (load.requests.completed, load.requests.running) == (COUNT + len(sampled) + 1, 0)
        assert load.free_blocks == load.total_blocks
        await gang.ranks[0].stop.remote()
        async with asyncio.timeout(PATIENCE):
            assert await run == "rank 0 ended: it returned; rank 1 ended: it returned"
        await client.until(lambda: client.closed_by is not None)


async def test_a_killed_rank_ends_the_gang(running: Any) -> None:
    async with gang_of_two("killed") as (gang, client, run):
        client.submit(endless(8))
        await client.until(lambda: all(len(one.tokens) > 3 for one in client.answers.values()))
        os.kill(gang.pids[1], signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            reasons = await run
        dead, _, failed = reasons.partition("; ")
        assert dead == "rank 1: its process died"
        assert failed.startswith("rank 0 ended: EngineFault: ")
        assert "step " in failed
        await client.until(lambda: client.closed_by is not None)
        assert not any(one.finish for one in client.answers.values())


async def test_a_rank_killed_while_idle_is_named_by_the_next_plan(running: Any) -> None:
    async with gang_of_two("idle") as (gang, client, run):
        os.kill(gang.pids[1], signal.SIGKILL)
        await gone(gang.pids[1])
        client.submit(endless(1))
        async with asyncio.timeout(PATIENCE):
            assert (await run).startswith("rank 1: its process died")
        await client.until(lambda: client.closed_by is not None or client.done())


async def test_a_stopped_rank_is_named_and_leaves_nothing_behind(running: Any) -> None:
    async with gang_of_two("stopped", step_timeout=2.0) as (gang, client, run):
        client.submit(endless(8))
        await client.until(lambda: all(len(one.tokens) > 3 for one in client.answers.values()))
        os.kill(gang.pids[1], signal.SIGSTOP)
        async with asyncio.timeout(PATIENCE):
            reasons = await run
        # Whether its silence or rank 0's end in a collective is seen first: it is the one to blame.
        assert reasons.startswith((f"rank 1 (pid {gang.pids[1]}) has not answered for 2 s", "rank 1 does not answer;"))
        await client.until(lambda: client.closed_by is not None)


def test_a_replica_of_two_ranks_serves_and_is_replaced(running: Any) -> None:
    """Deployed beside the two of one rank, under the same model's name."""
    from ray import serve

    from cluster.engine_deployment import replica_application

    def gangs() -> dict[str, Any]:
        return {r.info.id: r for r in running.ready() if r.info.id not in before}

    before = {r.info.id for r in running.ready()}
    config = replica(FOLDER, tensor_parallel=2, cache_bytes_cpu=32 << 20)
    config = replace(config, model=replace(config.model, name="demo"))
    application = replica_application(config, revision=None, replicas=1, secret=running.secret, threads=1)
    serve.run(application, name="pairs", route_prefix=None)
    try:
        await_true(gangs, "the replica of two ranks is not ready")
        texts = [f"What is {i} + 4?" for i in range(24)]
        said: dict[str, set[str]] = {text: set() for text in texts}

        def ask(text: str) -> None:
            for _ in range(2):
                said[text].add(running.chat(text, temperature=0)["choices"][0]["message"]["content"])

        threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=PATIENCE)
        assert all(len(one) == 1 for one in said.values()), said
        (first,) = gangs().values()
        await_true(lambda: gangs()[first.info.id].load.requests.completed > 0, "the gang was given no request")
        os.kill(first.info.pid, signal.SIGKILL)
        await_true(lambda: gangs() and first.info.id not in gangs(), "the gang was not replaced")
        assert "7" in running.chat("What is 3 + 4?")["choices"][0]["message"]["content"]
    finally:
        serve.delete("pairs")
    await_true(lambda: not gangs(), "the gang is still in the table")
    running.check_ledgers()
