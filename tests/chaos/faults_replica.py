"""Faults of replicas: a rank or a supervisor killed, a rank stopped, for good or for a while, or out of memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from chaos.clients import Seen
from chaos.fault import Fault, Scene
from chaos.processes import pids
from chaos.waiting import look

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site

PAUSE_SECONDS = 6.0
LONG_PROMPTS, LONG_TIMES = 4, 60
WHOLE_REQUESTS = 8
WHOLE_TOKENS = (300, 400)


class _ReplicaFault(Fault):
    """Shows as soon as the dispatcher gives the victim no more leases. `rank` is the one that is hit."""

    rank: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.replica_id = ""
        self.pid = 0

    async def choose(self, scene: Scene) -> Any:
        """The victim's row."""
        row = await scene.victim()
        self.replica_id, self.pid = row.info.id, row.info.pid
        if self.rank:
            self.pid = await look(lambda: scene.site.rank(self.replica_id, self.rank))
        self.victim = f"{row.info.id} (pid {self.pid}, {row.leases} leases)"
        self.figures["leases"] = row.leases
        return row

    def noticed(self, site: Site) -> bool:
        return self.replica_id not in {row.info.id for row in site.ready()}


class RankKilled(_ReplicaFault):
    """SIGKILL to the rank."""

    name: ClassVar[str] = "rank killed"

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        self.send(self.pid, signal.SIGKILL)


class SupervisorKilled(_ReplicaFault):
    """SIGKILL to a replica's Serve process, which takes the gang along."""

    name: ClassVar[str] = "supervisor killed"

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        pid = await look(lambda: scene.site.supervisor(self.replica_id))
        self.send(pid, signal.SIGKILL)


class RankStopped(_ReplicaFault):
    """SIGSTOP to the rank: it hangs without a word. Its supervisor must name and replace it."""

    name: ClassVar[str] = "rank stopped"

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        self.send(self.pid, signal.SIGSTOP)

    async def after(self, scene: Scene) -> str:
        """The log has named the guilty rank."""
        named = rf"rank {self.rank} \(pid {self.pid}\) is silent"
        return "" if await look(lambda: scene.site.said("serve/replica_*", named)) else "no log names the stopped rank"

    async def heal(self, scene: Scene) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class FollowerKilled(RankKilled):
    """SIGKILL to the second rank of a gang."""

    name: ClassVar[str] = "follower killed"
    rank: ClassVar[int] = 1


class FollowerStopped(RankStopped):
    """SIGSTOP to the second rank of a gang: the first one hangs in a collective, and is not to blame."""

    name: ClassVar[str] = "follower stopped"
    rank: ClassVar[int] = 1


class RankPaused(_ReplicaFault):
    """SIGSTOP to rank 0, and SIGCONT some seconds later: it goes on where it was, and nobody may hear of it."""

    name: ClassVar[str] = "rank paused"
    hold: ClassVar[float] = PAUSE_SECONDS + 2.0

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        self.send(self.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._go_on)

    def _go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    async def heal(self, scene: Scene) -> None:
        self._go_on()


class RankStarved(_ReplicaFault):
    """No rank may take more memory, and prompts come that need some: a step that cannot have it fails."""

    name: ClassVar[str] = "memory cap"
    hold: ClassVar[float] = 6.0

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        self._before = resource.prlimit(self.pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        self.at = monotonic()
        short = scene.oracle.ask(scene.rng, tokens=(4, 4), choices=1)
        long = [replace(short, text=f"{n} {short.text} " * LONG_TIMES) for n in range(LONG_PROMPTS)]
        self._long = [Seen(ask, monotonic()) for ask in long]  # their own text is not known, and not judged
        self._tasks = [asyncio.create_task(scene.load.client.ask(seen)) for seen in self._long]

    def noticed(self, site: Site) -> bool:
        """The replica was given up, or all had room enough."""
        return super().noticed(site) or all(task.done() for task in self._tasks)

    async def after(self, scene: Scene) -> str:
        await asyncio.gather(*self._tasks)
        self.figures["replaced"] = float(await look(lambda: super(RankStarved, self).noticed(scene.site)))
        return ""

    async def heal(self, scene: Scene) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.pid, resource.RLIMIT_AS, self._before)


class KilledUnderWhole(_ReplicaFault):
    """SIGKILL to the rank that makes answers which are not streamed: they come all the same."""

    name: ClassVar[str] = "rank killed under whole answers"

    async def inject(self, scene: Scene) -> None:
        asks = [
            scene.oracle.ask(scene.rng, tokens=WHOLE_TOKENS, stream=False, choices=1) for _ in range(WHOLE_REQUESTS)
        ]
        self._tasks = [asyncio.create_task(scene.load.one(ask)) for ask in asks]
        await asyncio.sleep(0.3)
        await self.choose(scene)
        self.send(self.pid, signal.SIGKILL)

    async def after(self, scene: Scene) -> str:
        await asyncio.gather(*self._tasks)
        return ""


class GangKilled(_ReplicaFault):
    """SIGKILL to rank and supervisor at once: nobody of the replica is left to say so."""

    name: ClassVar[str] = "whole replica killed"

    async def inject(self, scene: Scene) -> None:
        await self.choose(scene)
        supervisor = await look(lambda: scene.site.supervisor(self.replica_id))
        os.kill(supervisor, signal.SIGKILL)
        self.send(self.pid, signal.SIGKILL)


class HeadSilent(Fault):
    """Ray's GCS is stopped for some seconds: nothing of ours needs it in between."""

    name: ClassVar[str] = "GCS stopped for 15 s"
    hold: ClassVar[float] = 15.0

    async def inject(self, scene: Scene) -> None:
        (self._pid,) = await look(lambda: pids("gcs"))
        self.victim = f"gcs_server (pid {self._pid})"
        self.send(self._pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(self.hold, os.kill, self._pid, signal.SIGCONT)

    def noticed(self, site: Site) -> bool:
        return True

    async def heal(self, scene: Scene) -> None:
        os.kill(self._pid, signal.SIGCONT)
