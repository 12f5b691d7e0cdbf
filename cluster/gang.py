"""The ranks of one replica as Ray actors: their start, their end, and who is to blame for it.

Ray carries the start and the watching only; steps go through the plan channel and the collectives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import rank_options, ranks_by_node
from cluster.rank_actor import RankActor, Started
from cluster.starved import Delays, delays_of, most_waited
from cluster.step_qos import StepQos
from workers.api.config import ReplicaConfig
from workers.api.errors import EngineFault
from workers.api.replica import UP, ReplicaInfo, Stage

PULSE_SECONDS = 0.5
SHORTEST_LOOK = 0.1
NAMED_SECONDS = 1.5  # a rank silent for so long is named in the log; with two pulses a second, 2 s after it stopped
LINGER_SECONDS = 0.3  # the death of one rank fails the others: all are heard before one is blamed
BLAME_SECONDS = 0.5  # who does not answer for so long when others have ended is named ahead of them
ANSWER_SECONDS = 1.0
RANK_PREFIX = "rank-"  # of the actors' names; then the replica's id, and the rank

log = logging.getLogger("ray.serve")  # Serve routes this one to the replica's log file


class Gang:
    """`config.tensor_parallel` ranks, one in each bundle of `group`. Rank 0 serves the engine."""

    def __init__(
        self, config: ReplicaConfig, group: PlacementGroup, *, revision: str | None, replica_id: str, secret: str,
        threads: int, qos: StepQos | None = None,
    ) -> None:  # fmt: skip
        self._id = replica_id
        self._silence = config.step_timeout
        # Ranks that wait for a hung one give up after `step_timeout`, and their errors say more than a long step does.
        self._patience = config.step_timeout * (1.0 if config.tensor_parallel == 1 else 1.5)
        self._start_patience, self._clock = config.start_timeout, time.monotonic
        remote = ray.remote(RankActor)
        homes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        if len(set(homes.values())) > 1:
            log.warning("replica %s is spread over nodes; by bundle: %s", replica_id, homes)
        self.ranks: list[ActorHandle[Any]] = [
            remote.options(
                **rank_options(config),
                name=f"{RANK_PREFIX}{replica_id}-{rank}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            ).remote(config, revision, replica_id, rank, secret, threads, qos)
            for rank, bundle in enumerate(ranks_by_node(homes))
        ]
        self.pids: list[int] = []  # by rank, once started
        self._here: list[bool] = []  # by rank: whether it runs on our machine

    async def start(self) -> ReplicaInfo:
        """All ranks are loaded and warm, and rank 0 listens. Raises what the start of one of them raised.

        EngineFault: the start of the rank that it names has stood still for `start_timeout` seconds.
        """
        starting = asyncio.ensure_future(self._start_ranks())
        watches = [asyncio.ensure_future(self._stands_still(number)) for number in range(len(self.ranks))]
        try:
            await asyncio.wait([starting, *watches], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise EngineFault("; ".join(watch.result() for watch in watches if watch.done()))
            started = starting.result()
        except BaseException:
            self.kill()  # those that wait for the failed one
            raise
        finally:
            for task in (starting, *watches):
                task.cancel()
        self.pids = [one.pid for one in started]
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
        self._here = [one.node == node for one in started]
        for number, one in enumerate(started):
            phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in one.phases.items())
            log.info("replica %s rank %d (pid %d) is up: %s", self._id, number, one.pid, phases)
        info = started[0].info
        assert info is not None, "rank 0 tells it"
        return info

    async def _start_ranks(self) -> list[Started]:
        meeting = await self.ranks[0].call_meeting.remote() if len(self.ranks) > 1 else None
        return list(await asyncio.gather(*(rank.start.remote(meeting) for rank in self.ranks)))

    async def _stands_still(self, number: int) -> str:
        """Returns when the start of rank `number` has been at the same place, or silent, for too long."""
        known, since = Stage("no answer yet"), self._clock()
        asked = _asked(self.ranks[number].stage.remote())
        while self._clock() - since <= self._start_patience:
            await asyncio.wait([asked], timeout=PULSE_SECONDS)
            if not asked.done():
                continue
            if asked.exception() is not None:  # its death is for its `start` to tell
                await asyncio.Event().wait()
            if (stage := asked.result()) != known or stage == UP:
                known, since = stage, self._clock()
            await asyncio.sleep(PULSE_SECONDS)
            asked = _asked(self.ranks[number].stage.remote())
        return f"the start of rank {number} has stood still for {self._start_patience:g} s: {known}"

    async def sequences(self) -> int:
        """How many the engine has that have not ended; none where it cannot be asked."""
        asked = _asked(self.ranks[0].sequences.remote())
        await asyncio.wait([asked], timeout=ANSWER_SECONDS)
        return asked.result() if asked.done() and asked.exception() is None else 0

    async def run(self) -> str:
        """Returns once a rank has ended or hangs: which ones, and why; the first is the likely cause.

        The other ranks may still run: `kill` them.
        """
        runs = {number: _asked(rank.run.remote()) for number, rank in enumerate(self.ranks)}
        pulses = {number: asyncio.ensure_future(self._pulse(number)) for number in runs}
        try:
            await asyncio.wait([*runs.values(), *pulses.values()], return_when=asyncio.FIRST_COMPLETED)
            others = [n for n in runs if not (runs[n].done() or pulses[n].done())]
            linger = LINGER_SECONDS if len(runs) > 1 else 0.0
            mute, _ = await asyncio.gather(self._silent(others), asyncio.wait(runs.values(), timeout=linger))
            hung = {number: pulse.result() for number, pulse in pulses.items() if pulse.done()}
        finally:
            for pulse in pulses.values():
                pulse.cancel()
        ended = {number: run.exception() for number, run in runs.items() if run.done()}
        dead = [f"rank {n}: its process died" for n, e in ended.items() if isinstance(e, ray.exceptions.RayActorError)]
        silent = [f"rank {n} does not answer" for n in mute if n not in ended and n not in hung]
        silent += [told for answers, told in hung.values() if not answers]
        stuck = [told for answers, told in hung.values() if answers]  # may be in wait of a silent one
        failed = [
            f"rank {n} ended: {_cause(e)}"
            for n, e in ended.items()
            if not isinstance(e, ray.exceptions.RayActorError)
        ]  # fmt: skip
        return "; ".join([*dead, *silent, *stuck, *failed])

    async def _pulse(self, number: int) -> tuple[bool, str]:
        """Returns when rank `number` is silent, or in one step, for too long: whether it answers, and what it did.

        Its death is for `run` to see.

        Time in which the machine gave it no processor is not its own: having too much to do is no reason to end it.
        """
        pid = self.pids[number]
        while True:
            then, began = self._delays(number), time.monotonic()
            ping = _asked(self.ranks[number].ping.remote())
            silent, named = 0.0, False
            while not ping.done() and silent < self._silence:
                limit = self._silence if named else min(NAMED_SECONDS, self._silence)
                await asyncio.wait([ping], timeout=max(limit - silent, SHORTEST_LOOK))
                silent = time.monotonic() - began - most_waited(then, self._delays(number))
                if not ping.done() and not named and silent >= limit:
                    log.warning("replica %s rank %d (pid %d) is silent for %g s", self._id, number, pid, limit)
                    named = True
            if not ping.done():
                return False, f"rank {number} (pid {pid}) has not answered for {self._silence:g} s"
            if ping.exception() is None and ping.result() > self._patience:
                return True, f"rank {number} (pid {pid}) is in one step for {ping.result():.0f} s"
            await asyncio.sleep(PULSE_SECONDS)

    def _delays(self, number: int) -> Delays:
        return delays_of(self.pids[number]) if self._here[number] else {}

    async def _silent(self, numbers: list[int]) -> list[int]:
        if not numbers:
            return []
        pings = {n: _asked(self.ranks[n].ping.remote()) for n in numbers}
        await asyncio.wait(pings.values(), timeout=BLAME_SECONDS)
        return [n for n, ping in pings.items() if not ping.done() or ping.exception() is not None]

    def kill(self) -> None:
        """End all ranks, whatever they do."""
        for rank in self.ranks:
            ray.kill(rank)


def _asked(call: Awaitable[Any]) -> asyncio.Future[Any]:
    """A call that is under way. Ranks that are ended fail those that nobody waits for any more: that is no news."""
    asked = asyncio.ensure_future(call)
    asked.add_done_callback(lambda done: done.cancelled() or done.exception())
    return asked


def _cause(error: BaseException | None) -> str:
    if error is None:
        return "it returned"
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"
