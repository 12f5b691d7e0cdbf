"""What a fault is: something that is done to the cluster under load, how it shows, and what undoes it."""

from __future__ import annotations

import os
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from chaos.clients import Load, Seen
from chaos.judge import Fate
from chaos.oracle import Oracle
from chaos.waiting import look

if TYPE_CHECKING:  # it imports Ray
    from chaos.site import Site


@dataclass(slots=True)
class Scene:
    """Where a fault happens."""

    site: Site
    load: Load
    oracle: Oracle
    rng: random.Random

    async def victim(self, ready: list[Any] | None = None) -> Any:
        """The row of the ready replica with the most leases: most streams are touched. Raises LookupError."""
        rows = await look(self.site.ready) if ready is None else ready
        if not rows:
            raise LookupError("no replica is ready")
        return max(rows, key=lambda row: (row.leases, row.info.id))


class Fault(ABC):
    """One kind; an object is one time that it happens.

    `needs`: ready replicas before. `least`: streams in flight at the fault, fewer are no trial. `hold`: seconds for
    which new requests go on coming. `forgives`: fates that are declared for it. `whose`: what is declared depends on
    the ingress that carried a stream.
    """

    name: ClassVar[str]
    needs: ClassVar[int] = 2
    least: ClassVar[int] = 8
    hold: ClassVar[float] = 1.5
    forgives: ClassVar[frozenset[Fate]] = frozenset()
    whose: ClassVar[bool] = False
    look_every: ClassVar[float] = 0.02  # seconds between two looks whether it was noticed

    def __init__(self) -> None:
        self.victim = ""  # a name, for the record
        self.at = 0.0  # when it happened, by `monotonic`
        self.figures: dict[str, float] = {}  # what this kind alone measures

    @abstractmethod
    async def inject(self, scene: Scene) -> None:
        """It has happened: `victim` and `at` are set. Raises LookupError or OSError where there is nothing to hit."""

    @abstractmethod
    def noticed(self, site: Site) -> bool:
        """Whether the cluster has found out, or has come to itself. Blocks for milliseconds."""

    async def after(self, scene: Scene) -> str:
        """Called when the touched streams have ended: what is wrong beside them; "" when nothing is."""
        return ""

    def excuses(self, seen: Seen) -> bool:
        """Whether the way in which `seen` ended is declared. Its `front` is known, as far as it can be."""
        return seen.verdict is not None and seen.verdict.fate in self.forgives

    def void(self, touched: Sequence[Seen]) -> str:
        """Why it proves nothing that the streams in flight were `touched`; "" when it does."""
        return ""

    async def heal(self, scene: Scene) -> None:  # noqa: B027
        """What does not undo itself is undone."""

    def send(self, pid: int, number: signal.Signals) -> None:
        """A signal, and the moment of it."""
        os.kill(pid, number)
        self.at = monotonic()
