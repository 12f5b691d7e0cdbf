"""Feeds jobs to an engine when they are due, in real time, and keeps what came of them and of each step."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from live.figures import Figure, single
from simulation.jobs import Job

from router.qos.config import QosConfig
from router.qos.ledger import Prices
from router.qos.policy import Policy
from router.qos.steps import StepOrder, step_limits
from workers.api.config import EngineConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.engine.plan import Executor, StepHandle, StepPlan
from workers.rank import Rank

_FIRST_ID = 10  # below are special ones


@dataclass(frozen=True, slots=True)
class Step:
    """One step: when it was committed and how long the device took (seconds), and its tokens."""

    at: float
    seconds: float
    prefill: int
    decode: int
    overhead: int


@dataclass(slots=True)
class Fed:
    """What a run came to. Times of it and of its jobs are seconds since its start.

    `empty_plans`: steps that ran nothing while nothing was under way and requests waited. `off_books`: tokens by which
    the bills of all requests, the engine's counters, the policy's ledger and the plans differ; 0 in sound books.
    """

    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)
    empty_plans: int = 0
    preemptions: int = 0
    off_books: int = 0

    @property
    def longest(self) -> float:
        """Seconds of the longest step."""
        return max(step.seconds for step in self.steps)

    @property
    def recomputed(self) -> float:
        """The part of the device's busy time that went to tokens run again: of each step, by the number of tokens."""
        again = sum(s.seconds * s.overhead / (s.prefill + s.decode + s.overhead) for s in self.steps)
        return again / sum(s.seconds for s in self.steps)

    def speed(self, since: float, until: float) -> float:
        """Useful tokens a second of the steps committed in that time."""
        return sum(s.prefill + s.decode for s in self.steps if since < s.at <= until) / (until - since)


class Plant:
    """One rank and the engines made on it, one after the other, each ordered as a replica orders its own."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    @property
    def blocks(self) -> int:
        """Of the KV cache."""
        return self._rank.num_blocks

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self._rank.max_model_len

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._rank.vocab_size

    @property
    def size(self) -> EngineConfig:
        """Limits of its engines."""
        return self._rank.config.engine

    def fresh_engine(self) -> Engine:
        """First come, first served."""
        return self._rank.make_engine()

    def run(
        self, config: QosConfig | None, jobs: Sequence[Job], *, until: float = inf, blocks: int | None = None
    ) -> Fed:
        """`jobs` in a fresh engine of `blocks` (None: all of them), to their end or until so many seconds; what is
        live then is aborted. `config` None: first come, first served. The engine's ledgers are checked.
        """
        rank, size = self._rank, self._rank.config.engine
        blocks = rank.num_blocks if blocks is None else min(blocks, rank.num_blocks)
        order = None
        if config is not None:
            prices, pool = Prices(), blocks * size.block_size
            context = min(rank.max_model_len, pool)
            limits = step_limits(prices, step_tokens=size.max_num_batched_tokens, pool_tokens=pool, context=context)
            order = StepOrder(config, limits, prices)
        executor = _Counting(rank.runner)
        engine = Engine(
            size,
            executor,
            num_blocks=blocks,
            max_model_len=rank.max_model_len,
            vocab_size=rank.vocab_size,
            ordering=order,
        )
        fed, bills = _feed(engine, jobs, requests_of(jobs, rank.vocab_size), until)
        fed.preemptions = engine.stats.preemptions
        fed.off_books = abs(executor.tokens - engine.stats.executed) + (
            0 if order is None else _off(order.policy, bills)
        )
        engine.check_ledgers()
        return fed


def soundness(name: str, runs: Sequence[Fed]) -> list[Figure]:
    """What must be 0 in every run."""
    return [
        single(f"{name}: empty plans", sum(fed.empty_plans for fed in runs), "", 0.0),
        single(f"{name}: tokens off the books", sum(fed.off_books for fed in runs), "", 0.0),
    ]


def requests_of(jobs: Sequence[Job], vocab: int) -> list[EngineRequest]:
    """Greedy, exact lengths, no two prompts alike from their first block on."""
    rng, span = random.Random(0), vocab - _FIRST_ID
    longest = max((j.prompt for j in jobs), default=0)
    common = tuple(rng.choices(range(_FIRST_ID, vocab), k=2 * longest))
    made = []
    for job in jobs:
        own = (_FIRST_ID + job.number % span, _FIRST_ID + job.number // span % span)
        start = rng.randrange(longest)
        prompt = (*own, *common[start : start + job.prompt])[: job.prompt]
        made.append(EngineRequest(job.name, prompt, SamplingParams(job.output, temperature=0.0), owner=job.user))
    return made


def _feed(
    engine: Engine, jobs: Sequence[Job], requests: Sequence[EngineRequest], until: float
) -> tuple[Fed, Counter[str]]:
    """What came of it, and the tokens on the bills of each user."""
    fed, bills = Fed(), Counter[str]()
    by_name = {job.name: job for job in jobs}
    coming = deque(sorted(zip(jobs, requests, strict=True), key=lambda pair: pair[0].arrived))
    began = time.perf_counter()
    leaving = False
    while True:
        now = time.perf_counter() - began
        if now >= until and not leaving:
            leaving, fed.seconds = True, now
            coming.clear()
            for name in [n for n, job in by_name.items() if job.ended is None]:
                engine.abort(name)
        while coming and coming[0][0].arrived <= now:
            engine.submit(coming.popleft()[1])
        if not engine.has_work:
            if not coming:
                break
            time.sleep(max(0.0, min(coming[0][0].arrived, until) - now))
            continue
        steps = engine.stats.steps
        deltas = engine.step()
        now = time.perf_counter() - began
        report = engine.load()
        if report.step > steps:
            tokens = (report.prefill_tokens, report.decode_tokens, report.overhead_tokens)
            fed.steps.append(Step(now, report.step_seconds, *tokens))
        elif report.waiting and not (report.planned_prefill or report.planned_decode):
            fed.empty_plans += 1
        for delta in deltas:
            job = by_name[delta.request_id]
            if delta.token_ids and not leaving:
                job.emit(len(delta.token_ids), now)
            if delta.finish is not None:
                if delta.error is not None:
                    raise SystemExit(f"{job.name} of {job.user}: {delta.error}")
                job.ended = now
                bills[job.user] += delta.executed_prefill + delta.executed_decode
    fed.seconds = fed.seconds or time.perf_counter() - began
    return fed, bills


def _off(policy: Policy, bills: Counter[str]) -> int:
    """Tokens by which the policy's ledger differs from the bills, and from itself."""
    charged = {key[1]: totals.executed for key, totals in policy.ledger.accounts.items()}
    return abs(policy.ledger.missing) + sum(abs(charged.get(u, 0) - bills[u]) for u in {*charged, *bills})


class _Counting:
    """An executor that counts the tokens of the plans that it passes on."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.tokens = 0

    def submit(self, plan: StepPlan) -> StepHandle:
        self.tokens += plan.num_tokens
        return self._inner.submit(plan)
