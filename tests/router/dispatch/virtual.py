"""A dispatcher under a virtual clock, and short ways to make what it takes."""

from __future__ import annotations

import random
from itertools import count

from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Acquire, Granted, LeaseLost, Outcome, Refused, Settle
from router.dispatch.prefixes import PromptHashes
from workers.api.replica import LoadReport, ReplicaInfo

_NUMBERS = count()


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(config: DispatcherConfig | None = None, *, seed: int = 0) -> tuple[Dispatcher, Clock]:
    clock = Clock()
    return Dispatcher(config or DispatcherConfig(recovery=0.0), clock=clock, rng=random.Random(seed)), clock


def info(replica_id: str, model: str = "m", *, slots: int = 4, blocks: int = 100, context: int = 4096) -> ReplicaInfo:
    return ReplicaInfo(replica_id, model, "host", 1, context, slots, num_blocks=blocks, block_size=16)


def ask(
    lease_id: str | None = None,
    *,
    prompt: int = 32,
    max_tokens: int = 64,
    prompt_hashes: PromptHashes | None = None,
    **rest: object,
) -> Acquire:
    fields: dict[str, object] = {"model": "m", "prompt": prompt_hashes, **rest}
    name = lease_id or f"lease{next(_NUMBERS)}"
    return Acquire(lease_id=name, prompt_tokens=prompt, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def done(lease_id: str, output: int = 10, outcome: Outcome = Outcome.COMPLETED) -> Settle:
    return Settle(lease_id, outcome, output_tokens=output)


def replica_of(answer: Granted | Refused | LeaseLost | None) -> str:
    assert isinstance(answer, Granted)
    return answer.replica.id


def decode_steps(step_seconds: float, *, first: int = 0, steps: int = 10, running: int = 1) -> list[LoadReport]:
    """Reports of decode steps that each took `step_seconds`."""
    return [
        LoadReport(first + i, step_seconds, decode_tokens=running, running=running, kv_tokens=100 * running)
        for i in range(steps)
    ]
