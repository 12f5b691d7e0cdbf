"""One page of metrics from those of several fronts, in Prometheus' text format.

A scrape reaches any one of the fronts, so each hands on the others' numbers too: every sample gets the label `front`,
and stays a series of its own. A front's page goes by the dispatcher even when it answers the scrape itself; so nobody
is ever shown an older page of it than was shown before, and no counter runs backwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import AskPages, FrontPage, FrontPages
from router.engine_metrics import EngineMetrics
from router.metrics import Metrics

PUSH_SECONDS = 5.0
ASK_SECONDS = 1.0

log = logging.getLogger("echelon.metrics")


class FrontMetrics:
    """The page of one front, `own` its numbers. Pages are written in a thread: they may take some milliseconds."""

    def __init__(self, client: DispatcherClient, own: Metrics, engines: EngineMetrics | None = None) -> None:
        self._client, self._metrics, self._engines = client, own, engines
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on the other fronts know our numbers."""
        self._task = self._task or asyncio.create_task(self._push(), name=f"{self._client.name}: metrics")

    async def close(self) -> None:
        """No more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def page(self) -> bytes:
        """All fronts' numbers, and the engines'; without a dispatcher those of this front alone."""
        own = await self._own()
        self._client.tell(FrontPage(own))
        others: tuple[tuple[str, bytes], ...] = ()
        try:
            answer = await self._client.ask(AskPages, ASK_SECONDS)
        except ConnectionError as e:
            log.info("only this front's metrics: %s", e)
        else:
            assert isinstance(answer, FrontPages)
            others = answer.pages
        return await asyncio.to_thread(self._merged, ((self._client.name, own), *others))

    def _merged(self, pages: Sequence[tuple[str, bytes]]) -> bytes:
        return merged(pages) + (b"" if self._engines is None else self._engines.page())

    async def _push(self) -> None:
        while True:
            await asyncio.sleep(PUSH_SECONDS)
            self._client.tell(FrontPage(await self._own()))

    async def _own(self) -> bytes:
        self._metrics.look()
        return await asyncio.to_thread(self._metrics.page)


def merged(pages: Sequence[tuple[str, bytes]]) -> bytes:
    """The pages of `(front, page)` as one: a family's samples stand together, each with its front."""
    families: dict[str, list[str]] = {}
    known = False
    for front, page in pages:
        samples: list[str] = []
        for line in page.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                known = name in families
                samples = families.setdefault(name, [line])
            elif line.startswith("#"):
                if not known:
                    samples.append(line)
            elif line:
                samples.append(_labelled(line, front))
    return "".join(f"{line}\n" for samples in families.values() for line in samples).encode()


def _labelled(sample: str, front: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f'{name}{{front="{front}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{front="{front}"}} {value}'
