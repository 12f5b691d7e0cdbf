"""Two ranks, of which either may be out of memory anywhere in a pass: both run it in the same parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_eviction_by_copy import COPY, SMALL, asked
from test_out_of_memory import HEAVY, MESSAGE, planted, requests
from thread_ranks import ThreadGroup, on_ranks
from tiny import VOCAB, added, checkpoint, prompt, rank_of, replica, request, run

from workers.api.errors import OutOfMemory
from workers.api.request import EngineRequest, FinishReason
from workers.api.wire import FrameCodec
from workers.engine.core import Engine
from workers.engine.plan import StepHandle, StepMasks, StepPlan
from workers.execution.gang import follow
from workers.execution.pinned import HostBuffers
from workers.execution.runner import Runner
from workers.execution.swap import HostCache
from workers.parallel.attendance import BODY, GATHER, GREEDY, HEAD, LEARNED_FROM, Attendance, Collective
from workers.parallel.group import Group, Groups
from workers.rank import Rank

Place = tuple[str, int]  # of a pass: before which of its collectives, or in which of the model's functions
CODEC = FrameCodec({0: StepPlan, 1: StepMasks})


class Unlucky:
    """Memory of one rank: `where` says, of a pass of so many tokens, at which place there is none."""

    def __init__(self, where: Callable[[int], Place | None], heavy: int = HEAVY) -> None:
        self._where, self._heavy = where, heavy
        self._place: Place | None = None
        self._came = 0
        self.failed: list[Place] = []
        self.model: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._place, self._came = self._where(len(ids)), 0
        if bool((ids == self._heavy).any()):
            self._place = ("sum", 4)
        return self.model(ids, positions)

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.reach((HEAD, 0))
        return self.model.own_logits(hidden)

    def gather_logits(self, own: torch.Tensor) -> torch.Tensor:
        self.reach((GATHER, 0))
        logits = self.model.gather_logits(own)
        self.reach((GATHER, 1))  # as in the draws behind it
        return logits

    def greedy_tokens(self, own: torch.Tensor) -> torch.Tensor:
        self.reach((GREEDY, 0))
        tokens = self.model.greedy_tokens(own)
        self.reach((GREEDY, 1))
        return tokens

    def sum(self) -> None:
        self._came += 1
        self.reach(("sum", self._came))

    def reach(self, place: Place) -> None:
        if place == self._place:
            self._place = None
            self.failed.append(place)
            raise planted()


class UnluckyGroup(ThreadGroup):
    memory: ClassVar[dict[int, Unlucky]] = {}

    def _sum(self, x: torch.Tensor) -> None:
        if self.rank in self.memory and x.dtype.is_floating_point:
            self.memory[self.rank].sum()
        super()._sum(x)


class Plans:
    """The other rank's end."""

    def __init__(self, plans: SimpleQueue[bytes]) -> None:
        self._plans = plans

    def receive(self) -> StepPlan | StepMasks | None:
        body = self._plans.get()
        return CODEC.decode(body) if body else None


class Pair:
    """Rank 0's executor: what it runs goes to the other one as well."""

    def __init__(self, own: Runner, other: SimpleQueue[bytes]) -> None:
        self._own, self._other = own, other

    def submit(self, plan: StepPlan) -> StepHandle:
        self._other.put(CODEC.encode(plan)[4:])
        return self._own.submit(plan)

    def draw(self, masks: StepMasks) -> None:
        self._other.put(CODEC.encode(masks)[4:])
        self._own.draw(masks)


def serve(
    use: Callable[[Engine], Any],
    memory: dict[int, Unlucky] | None = None,
    *,
    made: Callable[[Rank], None] = lambda rank: None,
    **engine: Any,
) -> Any:
    """What `use` makes of the engine of two ranks with such memory."""
    config = replica(checkpoint("llama"), tensor_parallel=2, **{"max_num_batched_tokens": 60, **engine})
    plans: SimpleQueue[bytes] = SimpleQueue()

    def work(number: int, groups: Groups) -> Any:
        tp = UnluckyGroup("tp", number, 2, groups.tp.handle)
        rank = Rank(config, rank=number, groups=Groups(tp=tp))
        made(rank)
        for cache in rank.runner.caches:  # or blocks that are read too early would hold something of use
            cache.key.fill_(torch.nan)
            cache.value.fill_(torch.nan)
        groups.tp.barrier()
        if memory is not None and number in memory:
            memory[number].model, rank.runner.passes.model = rank.runner.passes.model, memory[number]
            UnluckyGroup.memory[number] = memory[number]
        try:
            if number:
                follow(rank.runner, Plans(plans))  # type: ignore[arg-type]
                return None
            served = rank.make_engine(Pair(rank.runner, plans))
            found = use(served)
            served.check_ledgers()
            return found
        finally:
            plans.put(b"")
            UnluckyGroup.memory.pop(number, None)

    return on_ranks(2, work)[0]


def run_all(wanted: list[EngineRequest]) -> Callable[[Engine], tuple[dict[str, list[int]], dict[str, str], int]]:
    """Tokens and errors by request, and how many steps were cut."""

    def use(engine: Engine) -> tuple[dict[str, list[int]], dict[str, str], int]:
        tokens: dict[str, list[int]] = {name: [] for one in wanted for name in one.answer_ids}
        errors = {}
        for one in wanted:
            engine.submit(one)
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
                if delta.finish is FinishReason.ERROR:
                    errors[delta.request_id] = str(delta.error)
        return tokens, errors, engine.stats.steps_cut

    return use


def anywhere(seed: int, most: int) -> Callable[[int], Place | None]:
    """Of most passes of over `most` tokens, somewhere."""
    places = [("sum", n) for n in range(1, 10)] + [(HEAD, 0), (GATHER, 0), (GATHER, 1), (GREEDY, 0), (GREEDY, 1)]
    dice = random.Random(seed)
    return lambda tokens: dice.choice(places) if tokens > most and dice.random() < 0.7 else None


def at(place: Place, *, over: int) -> Callable[[int], Place | None]:
    """At this place of each pass of over so many tokens."""
    return lambda tokens: place if tokens > over else None


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """The tokens of `requests`, of ranks with memory."""
    tokens, errors, cut = serve(run_all(requests()))
    assert (errors, cut) == ({}, 0)
    return dict(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_are_those_of_ranks_with_memory(
    seed: int, expected: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    memory = {rank: Unlucky(anywhere(10 * seed + rank, 4)) for rank in range(2)}
    got, errors, cut = serve(run_all(requests()), memory)
    assert got == expected
    assert errors == {}
    assert sum(len(one.failed) for one in memory.values()) > 1
    for rank in range(2):
        assert sum(f"rank {rank}, step" in m and "runs in halves" in m for m in caplog.messages) == cut > 0


@pytest.mark.parametrize(
    ("rank", "place"),
    [(0, ("sum", 1)), (1, ("sum", 4)), (0, ("sum", 7)), (1, (HEAD, 0)), (0, (GATHER, 0)), (1, (GATHER, 1))],
)
def test_one_rank_has_memory_for_few_tokens(
    rank: int, place: Place, expected: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Before its first sum, and others; in the logits; in the draws, before the gathering and behind it."""
    memory = {rank: Unlucky(at(place, over=3))}
    got, errors, cut = serve(run_all(requests()), memory)
    assert got == expected
    assert errors == {}
    assert set(memory[rank].failed) == {place}
    assert cut > 1
    assert f"there is none on rank {rank}" in caplog.text
    assert f"there is none on rank {1 - rank}" not in caplog.text


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_request_that_finds_no_room_for_one_token_fails_alone(
    ranks: tuple[int, ...], expected: dict[str, list[int]]
) -> None:
    heavy = request("heavy", (*prompt(5, seed=90), HEAVY, *prompt(20, seed=91)), max_tokens=6)
    good = requests()

    def use(engine: Engine) -> Any:
        first = run_all([*good[:2], heavy, *good[2:]])(engine)
        engine.check_ledgers()
        return first, run_all(good)(engine)  # its slot and its blocks are as good as any other

    (tokens, errors, _), (again, none, _) = serve(use, {rank: Unlucky(lambda tokens: None) for rank in ranks})
    assert tokens == {**expected, "heavy": []}
    assert list(errors) == ["heavy"]
    assert "out of memory for a single token" in errors["heavy"]
    assert (MESSAGE if 0 in ranks else "there is none on rank 1") in errors["heavy"]
    assert (again, none) == (expected, {})


def test_copies_to_and_from_the_host_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at a time, for which there is no memory either."""
    expected, _, _ = serve(run_all(asked()), block_size=4, num_blocks=400)
    index, failed = HostCache._index, []

    def limited(self: HostCache, blocks: Sequence[int], buffers: HostBuffers) -> torch.Tensor:
        if len(blocks) > 1 and self in caches:
            failed.append(len(blocks))
            raise planted()
        return index(self, blocks, buffers)

    caches: list[HostCache] = []
    copied = []

    def use(engine: Engine) -> Any:
        found = run_all(asked())(engine)
        copied.append(engine.roster.host.copied_in)
        return found

    def made(one: Rank) -> None:
        if one.rank:
            caches.append(one.runner._swap)

    monkeypatch.setattr(HostCache, "_index", limited)
    memory = {1: Unlucky(anywhere(1, 3), heavy=-1)}
    got, errors, cut = serve(use, memory, made=made, **SMALL, **COPY)
    assert (got, errors) == (expected, {})
    assert cut > 0
    assert copied[0] > 5
    assert failed


def test_log_probabilities_of_prompts_are_put_together() -> None:
    wanted = [request(name, prompt(n), max_tokens=2, prompt_logprobs=1) for name, n in (("a", 21), ("b", 6))]

    def use(engine: Engine) -> dict[str, list[Any]]:
        found = {}
        for one in wanted:
            engine.submit(one)
        while engine.has_work:
            found.update({d.request_id: list(d.prompt_logprobs) for d in engine.step() if d.prompt_logprobs})
        return found

    whole = serve(use)
    for place in (("sum", 2), (HEAD, 0), (GATHER, 0)):
        told = serve(use, {1: Unlucky(at(place, over=4))})
        assert sorted(told) == ["a", "b"]
        for name, values in told.items():
            assert [v and (v.token_id, v.rank) for v in values] == [v and (v.token_id, v.rank) for v in whole[name]]


@pytest.mark.parametrize(("rank", "place"), [(1, ("sum", 3)), (0, (GATHER, 0)), (1, (GATHER, 1))])
def test_draws_under_masks(rank: int, place: Place) -> None:
    """Of two sequences one may draw two tokens only."""
    allowed = (7, 150)
    bits = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in allowed:
        bits[token // 32] |= np.uint32(1 << token % 32)
    ids = prompt(9), prompt(14)
    news = added(0, ids[0]), replace(added(1, ids[1]), masked=True)
    plan = StepPlan(0, (), news, (run(0, 0, 9, blocks=(0,)), run(1, 0, 14, blocks=(1,))), masked=(1,))

    def drawn(memory: dict[int, Unlucky] | None) -> tuple[list[tuple[int, ...]], bool]:
        def use(engine: Engine) -> Any:
            handle = engine._executor.submit(plan)
            engine._executor.draw(StepMasks(0, (1,), bits.tobytes()))
            result = handle.result()
            return [(slot.slot, slot.token_ids, slot.fault) for slot in result.slots], result.cut

        return serve(use, memory)

    whole, cut = drawn(None)
    assert not cut
    assert whole[1][1][0] in allowed
    assert drawn({rank: Unlucky(at(place, over=4))}) == (whole, True)


def test_a_model_whose_collectives_are_not_known_ends_with_such_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attendance, "conclude", lambda self: "they come as they like")
    with pytest.raises(OutOfMemory, match="rank 0, step 0"):
        serve(run_all(requests()), {rank: Unlucky(at(("sum", 2), over=4)) for rank in range(2)})


def learned(run: Callable[[int], list[Collective]]) -> Attendance:
    """One piece, whose collectives `run` tells by rows."""
    made = Attendance()
    for rows in LEARNED_FROM:

        def come(rows: int = rows) -> None:
            for one in run(rows):
                made.note(torch.empty(one.shape, dtype=one.dtype), gathers=one.gathers)

        made.learn(BODY, rows, come)
    return made


def test_what_is_learned_of_collectives() -> None:
    good = learned(lambda n: [Collective(False, (n, 8), torch.float32), Collective(True, (1, 2 * n + 3), torch.int64)])
    assert good.conclude() is None
    assert good.reserve([(BODY, 100)], Group("tp", 0, 4, "here"), torch.device("cpu")) == 1792 + 4 * 8 * 203  # type: ignore[arg-type]
    for bad in (
        lambda n: [Collective(False, (n * n, 8), torch.float32)],
        lambda n: [Collective(False, (n, 8), torch.float32)] * n,
        lambda n: [Collective(n > 2, (n, 8), torch.float32)],
    ):
        assert "of its body" in (learned(bad).conclude() or "")


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_passes_have_the_collectives_that_were_learned(family: str) -> None:
    def work(number: int, groups: Groups) -> None:
        rank = rank_of(family, rank=number, groups=groups)
        members, passes = rank.groups.tp.attendance, rank.runner.passes
        assert members is not None
        for number, count in enumerate((1, 30, 45)):
            plan = StepPlan(number, (0,), (added(0, prompt(count), (0, 1, 2)),), (run(0, 0, count),))
            with torch.inference_mode():
                flat = rank.runner.state.flatten(plan)
                begun = passes.begin(flat, ())
                members.complete(passes._pieces(flat, ()), passes.group)  # there is none left, so nobody waits
                assert passes.end(begun, None) is not None
            members.complete([(GREEDY, 1)], passes.group)

    on_ranks(2, work)
