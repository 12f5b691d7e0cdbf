"""Faults of hosts: a link cut, and healed some seconds later; a host whose power fails. See `chaos.hosts_run`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from chaos.cables import Cables
from chaos.fault import Fault, Scene
from chaos.waiting import look

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site

CUT_SECONDS = 6.0


class _HostFault(Fault):
    """Of the worker host whose replica has the most leases, and which has no front: a front's death is another fault.
    `names` are the hosts by address.
    """

    cables: ClassVar[Cables]
    names: ClassVar[dict[str, str]]

    async def choose(self, scene: Scene) -> str:
        """Its name. Raises LookupError where there is none."""
        fronts = await look(scene.site.front_hosts)
        ready = await look(scene.site.ready)
        row = await scene.victim([r for r in ready if r.info.host in self.names and r.info.host not in fronts])
        self.replica_id, name = row.info.id, self.names[row.info.host]
        self.victim = f"{name} with {row.info.id} ({row.leases} leases)"
        self.figures["leases"] = row.leases
        return name

    def noticed(self, site: Site) -> bool:
        return self.replica_id not in {row.info.id for row in site.ready()}


class LinkCut(_HostFault):
    """The cable of a host is pulled, and put back: what its ranks made meanwhile reaches nobody."""

    name: ClassVar[str] = "link cut and healed"
    hold: ClassVar[float] = CUT_SECONDS + 2.0

    async def inject(self, scene: Scene) -> None:
        self._host = await self.choose(scene)
        self.at = await look(lambda: self.cables.ask("cut", self._host))
        self._healing = asyncio.create_task(self._heal())

    async def _heal(self) -> None:
        await asyncio.sleep(CUT_SECONDS)
        await look(lambda: self.cables.ask("heal", self._host))

    async def heal(self, scene: Scene) -> None:
        await self._healing


class HostKilled(_HostFault):
    """The power of a host fails; it boots again, and its Ray joins the cluster."""

    name: ClassVar[str] = "node killed"

    async def inject(self, scene: Scene) -> None:
        self._host = await self.choose(scene)
        self.at = await look(lambda: self.cables.ask("kill", self._host))

    async def heal(self, scene: Scene) -> None:
        await look(lambda: self.cables.ask("start", self._host))
