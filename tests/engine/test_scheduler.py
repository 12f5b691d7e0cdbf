"""What a plan holds, who is preempted, and that nothing stands still."""

from __future__ import annotations

import math

import pytest
from engine_orderings import ByOwner
from engine_runs import Harness, request
from fake_executor import VOCAB, oracle

from workers.api.request import FinishReason
from workers.engine.plan import StepPlan

PROMPT = [i * 7 % VOCAB for i in range(16)]


def shapes(plans: list[StepPlan]) -> list[list[tuple[int, int, int]]]:
    """(start, count, emit) of all that is scheduled, by step."""
    return [[(s.start, s.count, s.emit) for s in plan.scheduled] for plan in plans]


def test_a_long_prompt_runs_in_chunks_beside_decodes() -> None:
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=6, step_ahead=False)
    harness.submit(request("short", [1, 2], 5), request("long", PROMPT, 2))
    harness.drain()
    assert shapes(harness.executor.plans) == [
        [(0, 2, 1), (0, 4, 0)],
        [(2, 1, 1), (4, 5, 0)],
        [(3, 1, 1), (9, 5, 0)],
        [(4, 1, 1), (14, 2, 1)],
        [(5, 1, 1), (16, 1, 1)],
    ]


def test_part_done_prompts_come_before_new_ones() -> None:
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=10, step_ahead=False)
    harness.submit(request("a", PROMPT, 1), request("b", [1, 2, 3], 1))
    harness.drain()
    assert shapes(harness.executor.plans) == [[(0, 10, 0)], [(10, 6, 1), (0, 3, 1)]]


def test_a_last_prompt_token_alone_stands_with_the_decodes() -> None:
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=4, step_ahead=False)
    harness.submit(request("a", [1, 2, 3, 4, 5], 1), request("b", [6, 7, 8], 1))
    harness.drain()
    assert shapes(harness.executor.plans) == [[(0, 4, 0)], [(4, 1, 1), (0, 3, 1)]]


def test_the_next_step_is_submitted_before_the_last_is_awaited() -> None:
    harness = Harness()
    harness.submit(request("a", PROMPT, 4))
    assert harness.step() == []
    for submitted in (2, 3):
        deltas = harness.step()
        assert (len(harness.executor.plans), harness.executor.awaited) == (submitted, submitted - 1)
        assert [d.token_ids for d in deltas] == [
            tuple(oracle(request("", PROMPT), 128)[0][submitted - 2 : submitted - 1])
        ]
    harness.drain()
    assert shapes(harness.executor.plans) == [[(0, 16, 1)], [(16, 1, 1)], [(17, 1, 1)], [(18, 1, 1)]]
    assert harness.engine.stats.overhead == 0


def test_without_step_ahead_each_step_is_awaited_at_once() -> None:
    harness = Harness(step_ahead=False)
    harness.submit(request("a", PROMPT, 3))
    for step in range(1, 4):
        assert len(harness.step()) == 1
        assert len(harness.executor.plans) == harness.executor.awaited == step
    assert not harness.engine.has_work


@pytest.mark.parametrize("step_ahead", [True, False])
def test_a_stop_costs_one_discarded_token_when_planned_ahead(step_ahead: bool) -> None:
    answer = oracle(request("", PROMPT, 8), 128)[0]
    stop = answer[2]
    assert stop not in answer[:2]
    ordering = ByOwner()
    harness = Harness(step_ahead=step_ahead, ordering=ordering)
    harness.submit(request("a", PROMPT, 8, stop_ids=(stop,)))
    harness.drain()
    assert harness.receiver.tokens["a"] == answer[:3]
    assert harness.engine.stats.overhead == int(step_ahead)
    assert ordering.of("a") == (16, 2, 17 + 18, int(step_ahead))
    last = harness.receiver.last["a"]
    assert (last.executed_prefill, last.executed_decode) == (16, 2)


def test_blocks_and_slots_of_the_ended_are_reused() -> None:
    harness = Harness(max_num_seqs=1, num_blocks=4, prefix_caching=False, max_model_len=16)
    asked = [request(str(i), PROMPT[:9], 7, seed=i) for i in range(3)]
    harness.submit(*asked)
    harness.drain()
    assert [n.slot for p in harness.executor.plans for n in p.added] == [0, 0, 0]
    for one in asked:
        assert harness.receiver.tokens[one.id] == oracle(one, 16)[0]


def test_the_youngest_is_preempted_and_comes_back_before_others() -> None:
    harness = Harness(num_blocks=8, max_num_seqs=2, max_model_len=32, watermark=0, step_ahead=False)
    old, young, later = (request(name, PROMPT[i:][:8], 16, seed=i) for i, name in enumerate(["old", "young", "later"]))
    harness.submit(old, young, later)
    order = []
    for _ in range(200):
        order += [d.request_id for d in harness.step() if d.finish]
        harness.engine.check_ledgers()
    assert order == ["old", "young", "later"]
    assert harness.engine.load().preemptions >= 1
    for one in (old, young, later):
        assert harness.receiver.tokens[one.id] == oracle(one, 32)[0]


def test_the_ordering_chooses_the_victim() -> None:
    ordering = ByOwner()
    harness = Harness(num_blocks=10, max_num_seqs=2, watermark=0, ordering=ordering, prefix_caching=False)
    harness.submit(request("first", PROMPT[:8], 20, owner="z"), request("second", PROMPT[1:9], 20, owner="a", seed=1))
    harness.drain()
    assert harness.engine.stats.preemptions >= 1
    assert ordering.of("second")[3] == 0
    assert ordering.of("first")[3] > 0


def test_a_slot_is_taken_from_whom_the_ordering_ranks_behind() -> None:
    ordering = ByOwner()
    harness = Harness(max_num_seqs=2, ordering=ordering, step_ahead=False)
    harness.submit(*(request(f"z{i}", PROMPT[i:], 20, owner="z", seed=i) for i in range(2)))
    for _ in range(3):
        harness.step()
    harness.submit(request("a", PROMPT[2:], 4, owner="a"))
    assert [d.request_id for d in harness.step()] == ["z0", "a"]  # in the very next step, and the older one runs on
    harness.engine.check_ledgers()
    harness.drain()
    assert (ordering.of("a")[3], ordering.of("z0")[3]) == (0, 0)
    assert harness.engine.stats.preemptions == 1
    for name, prompt, count, seed in (("z0", PROMPT, 20, 0), ("z1", PROMPT[1:], 20, 1), ("a", PROMPT[2:], 4, 0)):
        assert harness.receiver.tokens[name] == oracle(request("", prompt, count, seed=seed), 128)[0]


def test_nobody_yields_where_that_would_not_do() -> None:
    ordering = ByOwner()
    harness = Harness(num_blocks=16, max_num_seqs=4, watermark=0, ordering=ordering, prefix_caching=False)
    harness.submit(request("a1", PROMPT, 24, owner="a"), request("z", PROMPT[:4], 12, owner="z"))
    for _ in range(4):
        harness.step()
    harness.submit(request("a2", PROMPT * 3, 2, owner="a"))  # needs 12 blocks; a1 holds 5
    for _ in range(4):
        harness.step()
        harness.engine.check_ledgers()
    assert harness.engine.load().running == 2
    assert harness.engine.stats.preemptions == 0
    harness.drain()


def test_a_part_done_prompt_takes_blocks_from_whom_the_ordering_ranks_behind_it() -> None:
    ordering = ByOwner()
    harness = Harness(
        num_blocks=8, max_num_seqs=2, max_num_batched_tokens=5, watermark=0, ordering=ordering, step_ahead=False
    )
    harness.submit(request("behind", PROMPT[:4], 20, owner="z"))
    harness.step()
    harness.submit(request("before", list(range(24)), 2, owner="a"))
    harness.drain()
    assert ordering.of("before")[3] == 0
    assert ordering.of("behind")[3] > 0


def test_part_done_prompts_that_block_each_other_are_resolved() -> None:
    harness = Harness(num_blocks=4, ordering=ByOwner(yields=False))
    harness.submit(request("a", PROMPT[:12], 1, owner="a"), request("z", PROMPT[:12], 1, owner="z"))
    roster = harness.engine.roster
    for name in "az":  # a state that admission avoids today: two part-done prompts that hold all blocks
        roster.admit(roster.live[name], [])
        roster.residents.grow(roster.live[name], 8)
        roster.backlog -= 8
    harness.engine.check_ledgers()
    planned = harness.engine._scheduler.plan(0.0)
    assert planned is not None
    assert [s.id for s in planned.sequences] == ["a"]
    assert roster.live["z"].preemptions == 1
    harness.engine.check_ledgers()


@pytest.mark.parametrize("quick", [False, True])
def test_steps_without_anything_to_decide_are_those_of_first_come_first_served(quick: bool) -> None:
    plans = []
    for ordering in (None, ByOwner(quick)):
        harness = Harness(ordering=ordering)
        harness.submit(*(request(str(i), PROMPT[i:], 5 + i, seed=i) for i in range(4)))
        harness.drain()
        plans.append([sorted(shape) for shape in shapes(harness.executor.plans)])
    assert plans[0] == plans[1]


def test_recomputed_tokens_are_overhead_and_each_position_is_charged_once() -> None:
    ordering = ByOwner()
    harness = Harness(num_blocks=12, max_num_seqs=4, watermark=0, ordering=ordering, prefix_caching=False)
    asked = [request(str(i), PROMPT[i : i + 8], 24, seed=i) for i in range(4)]
    harness.submit(*asked)
    harness.drain()
    overhead = 0
    for one in asked:
        prefill, decode, kv_read, again = ordering.of(one.id)
        assert (prefill, decode, kv_read) == (8, 23, sum(range(9, 32)))
        last = harness.receiver.last[one.id]
        assert (last.executed_prefill, last.executed_decode) == (8, 23)
        overhead += again
    assert overhead == harness.engine.stats.overhead > 0


def test_a_replay_charges_only_what_is_new() -> None:
    ordering = ByOwner()
    whole = request("whole", PROMPT, 10)
    answer = oracle(whole, 128)[0]
    harness = Harness(ordering=ordering)
    replay = request("replay", PROMPT, 10, resumed_ids=tuple(answer[:4]))
    harness.submit(replay)
    harness.drain()
    assert harness.receiver.tokens["replay"] == answer[4:]
    assert ordering.of("replay")[:2] == (0, 6)
    assert ordering.of("replay")[3] == 16 + 3


def test_admission_leaves_room_for_residents_to_grow() -> None:
    harness = Harness(num_blocks=16, max_num_seqs=8, max_num_batched_tokens=64, watermark=16, prefix_caching=False)
    harness.submit(*(request(str(i), PROMPT[:8], 16, seed=i) for i in range(8)))
    harness.step()
    assert harness.engine.load().running == 2  # each takes 2 blocks and may take 4 more
    harness.drain()
    assert harness.engine.stats.preemptions == 0


def test_nobody_is_preempted_while_a_sequence_is_about_to_end() -> None:
    harness = Harness(num_blocks=5, max_num_batched_tokens=20, watermark=0, prefix_caching=False)
    ending, growing = request("ending", PROMPT[:7], 2), request("growing", PROMPT[:11], 6, seed=1)
    harness.submit(ending, growing)
    harness.drain()
    # The last token of `ending` is in flight when `growing` needs a sixth block: it waits a step and gets a fifth.
    assert shapes(harness.executor.plans)[:3] == [[(0, 7, 1), (0, 11, 1)], [(7, 1, 1), (11, 1, 1)], [(12, 1, 1)]]
    assert harness.engine.stats.preemptions == 0
    assert harness.receiver.tokens["growing"] == oracle(growing, 20)[0]


@pytest.mark.parametrize("step_ahead", [True, False])
@pytest.mark.parametrize("watermark", [0, 1, 64])
def test_preemptions_of_one_request_are_bounded(watermark: int, step_ahead: bool) -> None:
    harness = Harness(
        num_blocks=16, max_num_seqs=8, watermark=watermark, step_ahead=step_ahead, prefix_caching=False, block_size=4
    )
    asked = [request(str(i), [i] * 4, 60, seed=i) for i in range(24)]
    most = 0
    harness.submit(*asked)
    while harness.engine.has_work:
        sequences = list(harness.engine.roster.live.values())
        harness.step()
        most = max([most, *(s.preemptions for s in sequences)])
    harness.check_idle()
    pool_tokens = 16 * 4
    assert most <= 2 + math.log2(pool_tokens / max(watermark, 1))
    assert (most > 0) == (watermark < 64)
    assert all(harness.receiver.finish(one.id) is FinishReason.LENGTH for one in asked)


@pytest.mark.parametrize(
    ("watermark", "preemptions", "running"), [(4, 0, 2), (4, 2, 2), (4, 3, 1), (0, 0, 2), (0, 4, 2), (0, 5, 1)]
)
def test_each_preemption_doubles_the_room_that_readmission_asks_for(
    watermark: int, preemptions: int, running: int
) -> None:
    harness = Harness(num_blocks=16, watermark=watermark, step_ahead=False)
    harness.submit(request("resident", PROMPT[:7], 40))
    harness.step()  # 14 blocks are left
    harness.submit(request("again", PROMPT[1:8], 40))
    harness.engine.roster.live["again"].preemptions = preemptions
    harness.step()  # it asks for 2 and, with room to grow, for 4, 10 or 18
    assert harness.engine.load().running == running
    harness.drain()


def test_an_answer_ends_where_the_pool_does() -> None:
    harness = Harness(num_blocks=3, max_model_len=1000)
    asked = request("a", PROMPT[:5], 100)
    harness.submit(asked)
    harness.drain()
    assert harness.engine.max_model_len == 12
    assert harness.receiver.tokens["a"] == oracle(asked, 12)[0]
    assert len(harness.receiver.tokens["a"]) == 7


@pytest.mark.parametrize("ordering", [None, ByOwner()])
def test_a_plan_adds_no_more_tokens_than_its_way_to_the_ranks_holds(
    ordering: ByOwner | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.scheduler.MOST_NEW_TOKENS", 30)
    harness = Harness(max_num_batched_tokens=200, ordering=ordering)
    harness.submit(*(request(f"r{i}", range(i, i + 12), 2) for i in range(7)), request("long", range(50), 2))
    harness.drain()
    added = [[len(new.token_ids) for new in plan.added] for plan in harness.executor.plans]
    assert max(map(len, added)) == 3, "two are under the bound"
    assert all(sum(tokens[:-1]) < 30 for tokens in added)
