"""Faults in front of the replicas: the dispatcher, an ingress or HAProxy killed, a bad file, a clock that jumps."""

from __future__ import annotations

import asyncio
import signal
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from chaos.clients import Seen
from chaos.fault import Fault, Scene
from chaos.judge import Fate
from chaos.processes import is_gone, pids
from chaos.waiting import look, until

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site

CUT = frozenset({Fate.TORN, Fate.UNANSWERED})
PROBE_SECONDS = 0.05
DYING_SECONDS = 30.0  # a process that was killed is gone by then
PROBE_TOKENS = (1, 4)
DAY = 86_400


async def probe(fault: Fault, scene: Scene) -> None:
    """Short requests one after the other, until one is answered: so many seconds after the fault."""
    while True:
        seen = Seen(scene.oracle.ask(scene.rng, tokens=PROBE_TOKENS, choices=1), monotonic())
        await scene.load.client.ask(seen)
        if seen.verdict is not None and seen.verdict.fate is Fate.EXACT:
            fault.figures["answered_after"] = monotonic() - fault.at
            return
        await asyncio.sleep(PROBE_SECONDS)


class DispatcherKilled(Fault):
    """SIGKILL to the dispatcher: streams go on, and requests that come meanwhile wait for the next one."""

    name: ClassVar[str] = "dispatcher killed"
    hold: ClassVar[float] = 5.0

    async def inject(self, scene: Scene) -> None:
        (self._pid,) = await look(lambda: pids("dispatcher"))
        self._rows = len(await look(scene.site.ready))
        self.victim = f"dispatcher (pid {self._pid})"
        self.send(self._pid, signal.SIGKILL)
        self._probing = asyncio.create_task(probe(self, scene))

    def noticed(self, site: Site) -> bool:
        return self._pid not in pids("dispatcher") and len(site.ready()) >= self._rows

    async def after(self, scene: Scene) -> str:
        await self._probing
        return ""


class _FrontFault(Fault):
    """What it carries is cut, as declared. `figures` say when a request was answered again, and a repeated one once."""

    forgives: ClassVar[frozenset[Fate]] = CUT
    hold: ClassVar[float] = 6.0
    role: ClassVar[str]

    async def inject(self, scene: Scene) -> None:
        running = await look(lambda: pids(self.role))
        self.pid, self.count = scene.rng.choice(running), len(running)
        self.victim = f"{self.role} (pid {self.pid}, one of {self.count})"
        self._keyed = uuid.uuid4().hex
        ask = scene.oracle.ask(scene.rng, tokens=(200, 250), stream=False, choices=1)
        self._first = asyncio.create_task(scene.load.one(ask, key=self._keyed))
        await asyncio.sleep(0.2)
        self.send(self.pid, signal.SIGKILL)
        self._dying = asyncio.create_task(self._await_end())
        self._ask = ask
        self._probing = asyncio.create_task(probe(self, scene))

    def noticed(self, site: Site) -> bool:
        return self._probing.done() and len(pids(self.role)) >= self.count

    async def after(self, scene: Scene) -> str:
        """Retries under one Idempotency-Key get one right answer, whatever became of the first try."""
        await self._dying
        await self._first
        await self._probing
        for _ in range(100):
            again = await scene.load.one(self._ask, key=self._keyed)
            assert again.verdict is not None
            if again.verdict.fate not in CUT:
                break
            await asyncio.sleep(PROBE_SECONDS)
        self.figures["retried_after"] = monotonic() - self.at
        return "" if again.verdict.fate is Fate.EXACT else f"the retry with the same key: {again.verdict}"

    async def heal(self, scene: Scene) -> None:
        for task in (self._probing, self._dying):
            task.cancel()
        await asyncio.gather(self._probing, self._dying, return_exceptions=True)

    async def _await_end(self) -> None:
        """Until then its sockets are open, one or the other, and take requests."""
        await until(lambda: is_gone(self.pid), DYING_SECONDS, every=0.005)
        self.gone = monotonic()


class IngressKilled(_FrontFault):
    """SIGKILL to one ingress: what it carried is cut, and nothing that others carry."""

    name: ClassVar[str] = "ingress killed"
    whose: ClassVar[bool] = True
    role: ClassVar[str] = "ingress"

    def excuses(self, seen: Seen) -> bool:
        """Nobody knows whose a request was that never got to a lease: of several ingresses the one that was killed may
        have had it if it was not accepted, and came before that one's last socket was closed.
        """
        if not super().excuses(seen):
            return False
        if seen.front:
            return self._killed(seen)
        return self.count == 1 or (seen.accepted is None and seen.began < self.gone)

    def void(self, touched: Sequence[Seen]) -> str:
        """Where there are several ingresses, the killed one and another have to carry something."""
        if self.count > 1 and {self._killed(seen) for seen in touched if seen.front} != {True, False}:
            return "no stream in flight was at the killed ingress, or none at another one"
        return ""

    def _killed(self, seen: Seen) -> bool:
        return seen.front.startswith(f"ingress-{self.pid}-")


class ProxyKilled(_FrontFault):
    """SIGKILL to HAProxy."""

    name: ClassVar[str] = "HAProxy killed"
    role: ClassVar[str] = "haproxy"


class BadConfig(Fault):
    """The QoS file turns bad: it is refused whole, with the line, and the old one serves on."""

    name: ClassVar[str] = "bad config reloaded"
    hold: ClassVar[float] = 3.0
    look_every: ClassVar[float] = 0.5  # it reads log files
    refusal: ClassVar[str] = r"stays as it was: [^\n]*qos\.json:3: [^\n]*"

    async def inject(self, scene: Scene) -> None:
        self._before = len(await look(lambda: scene.site.said("worker-*.err", self.refusal)))
        self.victim = scene.site.qos_file.name
        scene.site.write_qos('{\n "enable_user_qos": true,\n "user_groups": [,\n}')
        self.at = monotonic()

    def noticed(self, site: Site) -> bool:
        return len(site.said("worker-*.err", self.refusal)) > self._before

    async def heal(self, scene: Scene) -> None:
        scene.site.write_qos()


class ClockJumped(Fault):
    """The wall clock of every process jumps by a day, forth and back. `file` is the one that wall_clock.c reads.

    Noticed: Serve's controller, which would look after nobody for a day, was started again.
    """

    name: ClassVar[str] = "wall clock jumps a day"
    hold: ClassVar[float] = 6.0
    file: ClassVar[Path]

    async def inject(self, scene: Scene) -> None:
        self.victim = "every process"
        self._controllers = await look(lambda: pids("controller"))
        set_clock(self.file, DAY)
        self.at = monotonic()
        asyncio.get_running_loop().call_later(self.hold / 2, set_clock, self.file, -DAY)

    def noticed(self, site: Site) -> bool:
        now = pids("controller")
        return bool(now) and not set(now) & set(self._controllers)

    async def heal(self, scene: Scene) -> None:
        set_clock(self.file, 0)


def set_clock(file: Path, offset: int) -> None:
    """`offset` seconds from now on for all that have `file` in their memory."""
    with file.open("r+b" if file.exists() else "w+b") as f:
        f.write(struct.pack("=q", offset))
