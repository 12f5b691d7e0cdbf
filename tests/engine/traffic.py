"""Random traffic on a random engine, and what many seeded runs of it reached.

Each run: every plan checked by the executor, every answer equal to the oracle's (an aborted one a beginning of it),
one terminal delta a request, both ledgers balanced, each position charged once.

`python tests/engine/traffic.py FIRST LAST` runs the seeds [FIRST, LAST) and prints the counts.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from engine_orderings import ByOwner
from engine_runs import Harness, request
from fake_executor import VOCAB, beam_oracle, oracle

from router.qos.file import make_qos_config
from router.qos.policy import Limits
from router.qos.source import parse_source
from router.qos.standing import Standing
from router.qos.steps import StepOrder
from workers.api.errors import EngineFault
from workers.api.request import BeamParams, Delta, EngineRequest, FinishReason

TIERS = {
    "strict": "user_groups: [a, b]\nuser_group_map: {a: [{id: a1, quota_pct: 3}, {id: a2, quota_pct: 1}], "
    "b: [{id: b1, quota_pct: 1}, {id: b2, quota_pct: 0}]}",
    "one": "user_groups: [a]\nuser_group_map: {a: [{id: a1, quota_pct: 90}, {id: a2, quota_pct: 10}]}",
    "floors": "user_groups: [a, b]\nuser_group_map: {a: [{id: a1, quota_pct: 1}, {id: default, quota_pct: 1}], "
    "b: [{id: b1, quota_pct: 1}]}\ntiers: {b: {min_share: 0.3, max_wait: 0.2}}",
}


class Policy(StepOrder):
    """The shipped policy, at limits so small that it interferes all the time; keeps what was charged by account."""

    def __init__(self, rng: random.Random) -> None:
        config = make_qos_config(parse_source(TIERS[rng.choice(list(TIERS))], "f", as_json=False))
        limits = Limits(
            step=rng.choice([4.0, 30.0]),
            longest=rng.choice([0.0, 20.0]),
            pacing=rng.choice([None, 2.0]),
            quantum=rng.choice([1.0, 4.0, 512.0]),
            tau=rng.choice([0.0, 1e-4, 0.02, 1.0]),
        )
        super().__init__(config, limits)
        self.owners: dict[str, str] = {}

    def flow(self, request: EngineRequest) -> Standing:
        found = super().flow(request)
        self.owners[request.id.partition("~")[0]] = found.account.id  # of a part, the search's
        return found

    def check(self, last: dict[str, Delta], executed: int) -> None:
        """The books are the engine's: by account, and in all."""
        ledger = self.policy.ledger
        assert (ledger.missing, ledger.executed) == (0, executed)
        mine: dict[str, list[int]] = {}
        for name, delta in last.items():
            sums = mine.setdefault(self.owners[name.partition("/")[0]], [0, 0])
            sums[0] += delta.executed_prefill
            sums[1] += delta.executed_decode
        booked = {key[1]: [t.prefill, t.decode] for key, t in ledger.accounts.items()}
        assert booked == {owner: sums for owner, sums in mine.items() if any(sums)}
        for standing in self.policy._standings.values():
            assert abs(standing.pending) < 1e-6, f"{standing}: an expectation was never settled"
            assert (standing.queued, standing.resident) == (0, 0)


class Traffic:
    """One run, drawn from `rng`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.faulty = {rng.randrange(16): rng.randrange(1, 30) for _ in range(rng.choice([0, 0, 1, 3]))}
        self.ordering = rng.choice([None, ByOwner(rng.random() < 0.5), Policy(rng), Policy(rng)])
        slots = rng.randint(1, 6)
        self.harness = Harness(
            block_size=rng.choice([1, 2, 4, 8]),
            max_num_seqs=slots,
            max_num_batched_tokens=slots + rng.choice([0, 1, 3, 8, 40]),
            num_blocks=rng.choice([1, 2, 3, 5, 5, 8, 8, 13, 13, 21]),
            max_model_len=rng.choice([8, 20, 48, 48]),
            prefix_caching=rng.random() < 0.7,
            step_ahead=rng.random() < 0.7,
            watermark=rng.choice([0, 0, 0, 2, 8, 64]),
            ordering=self.ordering,
            fault=lambda seed, position: seed in self.faulty and position >= self.faulty[seed],
            fail_submit_at=rng.choice([None] * 30 + [rng.randrange(40)]),
            fail_result_at=rng.choice([None] * 30 + [rng.randrange(40)]),
            num_host_blocks=rng.choice([0, 0, 1, 3, 8, 30]),
        )
        self.shared = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(2)]
        self.asked: dict[str, EngineRequest] = {}
        self.most_preempted = 0
        self.failed = False

    def arrive(self) -> None:
        rng, room = self.rng, self.harness.engine.max_model_len - 1
        if not room:
            return
        length = rng.randint(1, min(room, 20))
        prompt = rng.choice(self.shared)[: rng.choice([0, length // 2, length])]
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(length - len(prompt))]
        max_tokens = rng.randint(1, 24)
        resumed = 0
        if rng.random() < 0.2:
            resumed = min(rng.randrange(max_tokens), room - length)
        asked = request(
            f"r{len(self.asked)}",
            prompt,
            max_tokens,
            seed=rng.choice([0, 1, len(self.asked)]),
            choice=rng.choice([0, 0, 1]),
            stop_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 2, 8]))),
            min_tokens=rng.choice([0, 0, 3]),
            resumed_ids=tuple(rng.randrange(VOCAB) for _ in range(resumed)),
            owner=rng.choice(["a1", "a2", "b1", "b2"]),
            salt=rng.choice([b"", b"", b"x"]),
        )
        if not resumed and rng.random() < 0.12:
            asked = self.search(asked)
        self.asked[asked.id] = asked
        self.harness.submit(asked)

    def search(self, asked: EngineRequest) -> EngineRequest:
        """A beam search in its place."""
        beams = BeamParams(self.rng.choice([1, 2, 3, 5]), self.rng.choice([-1.0, 0.0, 0.7, 1.0, 3.0]))
        return replace(asked, beams=beams, sampling=replace(asked.sampling, temperature=0.0, choice=0))

    def abort(self) -> None:
        if self.asked:
            self.harness.engine.abort(self.rng.choice(list(self.asked)))

    def step(self) -> None:
        self.harness.step()
        self.harness.engine.check_ledgers()
        live = self.harness.engine.roster.live.values()
        self.most_preempted = max([self.most_preempted, *(s.preemptions for s in live)])

    def run(self, operations: int) -> None:
        try:
            for _ in range(operations):
                self.rng.choice([self.arrive, self.step, self.step, self.step, self.step, self.rare])()
            work = sum(len(a.prompt_ids) + a.sampling.max_tokens * len(a.answer_ids) for a in self.asked.values())
            for _ in range(40 + 20 * work):
                if not self.harness.engine.has_work:
                    break
                self.step()
            assert not self.harness.engine.has_work, f"stuck: {self.harness.engine.load()}"
        except EngineFault:
            self.failed = True
            self.harness.receiver.take(self.harness.engine.fail_all("dead"))
        self.check()

    def rare(self) -> None:
        if self.rng.random() < 0.6:
            self.abort()
        elif self.rng.random() < 0.05:
            self.harness.receiver.take(self.harness.engine.fail_all("told to"))
        elif self.rng.random() < 0.2:
            for _ in range(8):
                self.arrive()

    def check(self) -> None:
        harness, receiver = self.harness, self.harness.receiver
        harness.check_idle()
        engine = harness.engine
        for asked in self.asked.values():
            if asked.beams is not None:
                self.check_search(asked)
                continue
            tokens, reason = oracle(asked, engine.max_model_len, harness.fault)
            last, got = receiver.last[asked.id], receiver.tokens[asked.id]
            if last.finish is FinishReason.ABORT or last.error in ("dead", "told to"):
                assert got == tokens[: len(got)]
                assert last.executed_prefill + last.cached_tokens <= len(asked.prompt_ids)
                continue
            assert (got, last.finish) == (tokens, reason)
            if last.finish is FinishReason.ERROR:
                continue
            if asked.resumed_ids:
                assert (last.cached_tokens, last.executed_prefill, last.executed_decode) == (0, 0, len(got))
            else:
                assert last.cached_tokens + last.executed_prefill == len(asked.prompt_ids)
                assert last.executed_decode == len(got) - 1
        if isinstance(self.ordering, Policy) and not self.failed:
            self.ordering.check(receiver.last, engine.stats.executed)
        elif isinstance(self.ordering, ByOwner):
            charged: dict[str, Counter[str]] = defaultdict(Counter)
            for name, (prefill, decode, _, _) in self.ordering.charges.items():
                charged[name.partition("~")[0]].update(prefill=prefill, decode=decode)
            for name, counts in charged.items():
                last = receiver.last[self.asked[name].answer_ids[0]]
                assert (counts["prefill"], counts["decode"]) == (last.executed_prefill, last.executed_decode)
            assert self.ordering.executed_tokens == engine.stats.executed
        elif self.ordering is None:
            pool_tokens = harness.num_blocks * harness.block_size
            assert self.most_preempted <= 2 + math.log2(pool_tokens / max(harness.watermark, 1) + 1)

    def check_search(self, asked: EngineRequest) -> None:
        """All answers at once, or none; the first bears the counts."""
        harness, receiver, names = self.harness, self.harness.receiver, asked.answer_ids
        found = [(tuple(receiver.tokens[name]), receiver.last[name].finish) for name in names]
        first, *others = (receiver.last[name] for name in names)
        assert not any(d.executed_prefill or d.executed_decode or d.cached_tokens for d in others)
        if first.finish is FinishReason.ABORT or first.error in ("dead", "told to"):
            assert set(found) == {((), first.finish)}
            return
        answers = beam_oracle(asked, harness.engine.max_model_len, harness.fault)
        if answers is None:
            assert set(found) == {((), FinishReason.ERROR)} or first.finish is not FinishReason.ERROR
            return
        assert found == answers
        assert first.cached_tokens + first.executed_prefill == len(asked.prompt_ids)


def reached(traffic: Traffic) -> set[str]:
    """Which kinds of event the run had."""
    stats, last = traffic.harness.engine.stats, traffic.harness.receiver.last
    ends = last.values()
    continued = [one for plan in traffic.harness.executor.plans for one in plan.continued]
    kinds = {
        "preemption": stats.preemptions > 0,
        "preempted more than once": traffic.most_preempted > 1,
        "prefix hit": stats.prefix_hits > 0,
        "copied back": traffic.harness.engine.roster.host.copied_in > 0,
        "step-ahead discard": stats.overhead > 0,
        "request fault": any(d.finish is FinishReason.ERROR and "not finite" in (d.error or "") for d in ends),
        "engine fault": traffic.failed,
        "resumed": any(a.resumed_ids for a in traffic.asked.values()),
        "beam goes on": any(one.source == one.slot for one in continued),
        "beam taken over": any(one.source != one.slot for one in continued),
        "beam search": any(a.beams and last[a.answer_ids[0]].token_ids for a in traffic.asked.values()),
    }
    kinds |= {f"finish {reason}": any(d.finish is reason for d in ends) for reason in FinishReason}
    return {name for name, seen in kinds.items() if seen}


def run_seeds(seeds: Iterable[int]) -> Counter[str]:
    """Run and check every seed; how many runs reached what. Raises AssertionError that names the seed."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        traffic = Traffic(random.Random(seed))
        try:
            traffic.run(operations=60)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        counts["runs"] += 1
        counts["requests"] += len(traffic.asked)
        counts["terminal deltas"] += len(traffic.harness.receiver.last)
        counts["answers"] += sum(len(asked.answer_ids) for asked in traffic.asked.values())
        counts["steps"] += traffic.harness.engine.stats.steps
        counts.update(reached(traffic))
    return counts


if __name__ == "__main__":
    started = time.process_time()
    found = run_seeds(range(int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps({"cpu seconds": round(time.process_time() - started), **dict(sorted(found.items()))}, indent=1))
