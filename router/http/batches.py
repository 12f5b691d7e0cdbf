"""The batches of one HTTP request: those of one generation request, or of several (a list of prompts) merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from router.generation import ChoiceDelta, GenerationRequest, Generator

Batch = tuple[ChoiceDelta, ...]


async def close(batches: AsyncIterator[Batch]) -> None:
    """Tell the generator that nobody reads on; afterwards its sequences are being aborted."""
    aclose = getattr(batches, "aclose", None)
    if aclose is not None:
        await aclose()


def open_batches(generator: Generator, requests: Sequence[GenerationRequest]) -> AsyncIterator[Batch]:
    """Batches of all `requests`; choice c of request p comes as p * n + c. The first one means: all are accepted."""
    if len(requests) == 1:
        return generator.generate(requests[0])
    return _merged(generator, requests)


async def _merged(generator: Generator, requests: Sequence[GenerationRequest]) -> AsyncIterator[Batch]:
    sources = [generator.generate(r) for r in requests]
    offsets = []
    total = 0
    for request in requests:
        offsets.append(total)
        total += len(request.samplings)
    # One place for each source: a reader that lags holds them back, and none takes the place of another.
    arrived: asyncio.Queue[tuple[int, Batch | BaseException | None]] = asyncio.Queue()
    places = [asyncio.Semaphore(1) for _ in sources]

    async def pump(p: int) -> None:
        try:
            async for batch in sources[p]:
                await places[p].acquire()
                arrived.put_nowait((p, batch))
            arrived.put_nowait((p, None))
        except Exception as e:
            arrived.put_nowait((p, e))

    tasks = [asyncio.create_task(pump(p)) for p in range(len(sources))]
    try:
        unaccepted, open_sources = set(range(len(sources))), len(sources)
        early: list[ChoiceDelta] = []
        while open_sources:
            p, item = await arrived.get()
            places[p].release()
            if isinstance(item, BaseException):
                raise item
            unaccepted.discard(p)
            if item is None:
                open_sources -= 1
                item = ()
            early += [ChoiceDelta(offsets[p] + d.choice, d.delta) for d in item]
            if not unaccepted:
                yield tuple(early)
                early = []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # cancelled by us; their errors went through the queue
        for source in sources:
            await close(source)
