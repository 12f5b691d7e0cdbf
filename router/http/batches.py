"""The batches of one HTTP request: those of one generation request, or of several (a list of prompts) merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router.generation import Batch, ChoiceDelta, GenerationRequest, Generator, Sink


async def generate_all(generator: Generator, requests: Sequence[GenerationRequest], sink: Sink) -> None:
    """See `Generator.generate`; choice c of request p comes as p * n + c. The first batch means: all are accepted.

    The first error of any ends all.
    """
    if len(requests) == 1:
        await generator.generate(requests[0], sink)
    else:
        await _merged(generator, requests, sink)


async def _merged(generator: Generator, requests: Sequence[GenerationRequest], sink: Sink) -> None:
    unaccepted = set(range(len(requests)))
    early: list[ChoiceDelta] = []

    def part(p: int, offset: int) -> Sink:
        def take(batch: Batch) -> bool:
            moved = [ChoiceDelta(offset + d.choice, d.delta) for d in batch]
            if not unaccepted:
                return sink(tuple(moved))
            unaccepted.discard(p)
            early.extend(moved)
            return bool(unaccepted) or sink(tuple(early))

        return take

    tasks = []
    offset = 0
    for p, request in enumerate(requests):
        tasks.append(asyncio.create_task(generator.generate(request, part(p, offset))))
        offset += len(request.samplings)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # the first error has risen, the rest are ours
