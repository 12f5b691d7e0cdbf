"""Requests in, deltas out: refusals, aborts, faults, the load report."""

from __future__ import annotations

import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB, oracle

from workers.api.errors import ContextLengthExceeded, EngineFault, InvalidRequest
from workers.api.request import Delta, EngineRequest, FinishReason, MediaSegment
from workers.engine.plan import StepPlan, StepResult
from workers.engine.sequence import Flow, Sequence
from workers.engine.stop import finish_reason

PROMPT = [i * 7 % VOCAB for i in range(16)]

REFUSED = {
    "empty": (request("r", []), "prompt"),
    "max_tokens": (request("r", [1], 0), "max_tokens"),
    "nothing left": (request("r", [1], 2, resumed_ids=(3, 4)), "max_tokens"),
    "prompt id": (request("r", [1, VOCAB]), "prompt"),
    "negative id": (request("r", [-1]), "prompt"),
    "resumed id": (request("r", [1], resumed_ids=(VOCAB,)), "prompt"),
    "stop id": (request("r", [1], stop_ids=(VOCAB,)), "stop_token_ids"),
    "allowed id": (request("r", [1], allowed_ids=(VOCAB,)), "allowed_token_ids"),
    "bias id": (request("r", [1], logit_bias=((VOCAB, 1.0),)), "logit_bias"),
    "adapter": (request("r", [1], adapter="x"), "model"),
    "media": (request("r", [1], media=(MediaSegment(0, 1, b"d"),)), "messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_run_is_refused_and_leaves_nothing(name: str) -> None:
    asked, param = REFUSED[name]
    harness = Harness()
    with pytest.raises(InvalidRequest) as refused:
        harness.engine.submit(asked)
    assert refused.value.param == param
    assert not harness.engine.has_work
    assert harness.engine.load().requests.accepted == 0
    harness.check_idle()


@pytest.mark.parametrize(("prompt", "resumed", "fits"), [(19, 0, True), (20, 0, False), (10, 10, False), (10, 9, True)])
def test_a_prompt_must_leave_room_for_a_token(prompt: int, resumed: int, fits: bool) -> None:
    harness = Harness(max_model_len=20)
    asked = request("r", [1] * prompt, 50, resumed_ids=(2,) * resumed)
    if fits:
        harness.submit(asked)
        harness.drain()
        assert len(harness.receiver.tokens["r"]) == 1
        assert harness.receiver.finish("r") is FinishReason.LENGTH
    else:
        with pytest.raises(ContextLengthExceeded, match="20 tokens"):
            harness.engine.submit(asked)


def test_a_live_id_is_refused_a_finished_one_is_not() -> None:
    harness = Harness()
    harness.submit(request("r", [1], 1))
    with pytest.raises(InvalidRequest, match="in use"):
        harness.engine.submit(request("r", [2], 1))
    harness.drain()
    harness.engine.submit(request("r", [2], 1))
    harness.engine.abort("r")
    assert [d.finish for d in harness.engine.step()] == [FinishReason.ABORT]


def test_the_deltas_of_a_request_carry_positions_and_the_last_one_the_counts() -> None:
    harness = Harness()
    answer = oracle(request("", PROMPT, 4), 128)[0]
    harness.submit(request("r", PROMPT, 4, resumed_ids=(answer[0],), logprobs=0))
    deltas: list[Delta] = []
    while harness.engine.has_work:
        deltas += harness.step()
    assert [d.position for d in deltas] == [1, 2, 3]
    assert [d.token_ids for d in deltas] == [(t,) for t in answer[1:]]
    assert [d.logprobs[0].token_id for d in deltas] == answer[1:]
    assert [d.finish for d in deltas] == [None, None, FinishReason.LENGTH]
    assert [d.executed_decode for d in deltas] == [0, 0, 3]


def test_stop_ids_count_only_after_min_tokens() -> None:
    everything = tuple(range(VOCAB - 1))
    harness = Harness()
    asked = request("r", PROMPT, 50, stop_ids=everything, min_tokens=5)
    harness.submit(asked)
    harness.drain()
    answer, reason = oracle(asked, 128)
    assert (harness.receiver.tokens["r"], harness.receiver.finish("r")) == (answer, reason)
    assert len(answer) >= 6
    assert answer[:5] == [VOCAB - 1] * 5


@pytest.mark.parametrize(("emitted", "ends"), [(4, False), (5, False), (6, True)])
def test_a_stop_id_that_the_sampler_should_have_masked_does_not_end(emitted: int, ends: bool) -> None:
    sequence = Sequence(
        request("r", PROMPT, 50, stop_ids=(7,), min_tokens=5, resumed_ids=(7,) * emitted), 0, 128, Flow(None)
    )
    assert (finish_reason(sequence) is FinishReason.STOP) == ends


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    answer = oracle(request("", PROMPT, 3), 128)[0]
    harness = Harness()
    harness.submit(request("r", PROMPT, 3, stop_ids=(answer[2],)))
    harness.drain()
    assert harness.receiver.tokens["r"] == answer
    assert harness.receiver.finish("r") is FinishReason.STOP


@pytest.mark.parametrize("step_ahead", [True, False])
@pytest.mark.parametrize("steps", range(9))
def test_an_abort_frees_everything_at_once(steps: int, step_ahead: bool) -> None:
    harness = Harness(step_ahead=step_ahead, max_num_batched_tokens=8)
    other = request("other", PROMPT[3:], 6)
    harness.submit(request("r", PROMPT, 50), other)
    for _ in range(steps):
        harness.step()
    harness.engine.abort("r")
    harness.engine.check_ledgers()
    assert "r" not in harness.engine.roster.live
    deltas = harness.step()
    assert [d.request_id for d in deltas if d.finish is FinishReason.ABORT] == ["r"]
    harness.drain()
    answer = oracle(request("", PROMPT, 50), 128)[0]
    emitted = harness.receiver.tokens["r"]
    assert emitted == answer[: len(emitted)]
    assert harness.receiver.tokens["other"] == oracle(other, 128)[0]
    assert harness.engine.load().requests.aborted == 1


def test_unknown_and_finished_ids_are_ignored_by_abort() -> None:
    harness = Harness()
    harness.submit(request("r", [1], 1))
    harness.drain()
    harness.engine.abort("r")
    harness.engine.abort("never seen")
    assert not harness.engine.has_work
    assert harness.engine.load().requests.completed == 1


def test_an_abort_of_a_waiting_request_with_nothing_in_flight_is_answered_by_the_next_step() -> None:
    harness = Harness()
    harness.submit(request("r", [1], 1))
    harness.engine.abort("r")
    assert harness.engine.has_work
    assert [(d.request_id, d.finish) for d in harness.step()] == [("r", FinishReason.ABORT)]
    assert harness.executor.plans == []
    harness.check_idle()


@pytest.mark.parametrize("step_ahead", [True, False])
def test_a_fault_ends_its_request_alone(step_ahead: bool) -> None:
    harness = Harness(step_ahead=step_ahead, fault=lambda seed, position: seed == 1 and position == 19)
    good, bad = request("good", PROMPT, 8), request("bad", PROMPT, 8, seed=1)
    harness.submit(bad, good)
    harness.drain()
    assert harness.receiver.tokens["bad"] == oracle(bad, 128)[0][:3]
    assert harness.receiver.last["bad"].error == "logits at position 19 are not finite"
    assert harness.receiver.tokens["good"] == oracle(good, 128)[0]
    counts = harness.engine.load().requests
    assert (counts.failed, counts.completed) == (1, 1)


@pytest.mark.parametrize("where", ["fail_submit_at", "fail_result_at"])
@pytest.mark.parametrize("step_ahead", [True, False])
def test_a_failed_step_fails_the_engine_and_every_request_is_told(where: str, step_ahead: bool) -> None:
    harness = Harness(step_ahead=step_ahead, max_num_seqs=2, **{where: 3})
    harness.submit(*(request(str(i), PROMPT, 8, seed=i) for i in range(4)))
    with pytest.raises(EngineFault, match="rank"):
        harness.drain()
    with pytest.raises(EngineFault, match="step 3"):
        harness.step()
    with pytest.raises(EngineFault, match="step 3"):
        harness.engine.submit(request("late", [1]))
    harness.engine.abort("0")
    deltas = harness.engine.fail_all("the rank died")
    harness.receiver.take(deltas)
    assert sorted((d.request_id, d.finish) for d in deltas) == [
        ("0", FinishReason.ABORT),
        *((str(i), FinishReason.ERROR) for i in (1, 2, 3)),
    ]
    assert {d.error for d in deltas} == {None, "the rank died"}
    assert not harness.engine.has_work
    harness.check_idle()
    assert harness.engine.step() == []


def test_fail_all_of_a_healthy_engine_leaves_it_usable() -> None:
    harness = Harness()
    harness.submit(*(request(str(i), PROMPT, 8, seed=i) for i in range(12)))
    for _ in range(3):
        harness.step()
    harness.receiver.take(harness.engine.fail_all("drained"))
    harness.engine.check_ledgers()
    assert harness.engine.load().requests.failed == 12
    again = request("again", PROMPT, 8)
    harness.submit(again)
    harness.drain()
    assert harness.receiver.tokens["again"] == oracle(again, 128)[0]


class Liar:
    """An executor that answers another plan."""

    def __init__(self, answer: StepResult) -> None:
        self.answer = answer

    def submit(self, plan: StepPlan) -> Liar:
        return self

    def result(self) -> StepResult:
        return self.answer


@pytest.mark.parametrize("answer", [StepResult(7, (), 0.0), StepResult(0, (), 0.0)])
def test_a_result_that_is_not_the_plans_fails_the_engine(answer: StepResult) -> None:
    harness = Harness(step_ahead=False)
    harness.engine._executor = Liar(answer)
    harness.submit(request("r", [1]))
    with pytest.raises(EngineFault, match="the executor answered"):
        harness.step()
    harness.receiver.take(harness.engine.fail_all("x"))
    harness.check_idle()


def test_the_load_report_says_what_is_there() -> None:
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=20, step_ahead=False)
    harness.submit(*(request(name, [i % 2, *PROMPT[1:]], 4, seed=i) for i, name in enumerate("abc")))
    assert harness.engine.load().prefill_backlog == 48
    harness.step()
    load = harness.engine.load()
    assert (load.step, load.running, load.waiting) == (1, 2, 1)
    assert (load.prefill_tokens, load.decode_tokens, load.overhead_tokens) == (20, 0, 0)
    assert (load.prefill_backlog, load.kv_tokens) == (12 + 16, 20)
    assert (load.free_blocks, load.total_blocks) == (64 - 5, 64)
    assert load.step_seconds == 0.001
    harness.step()
    load = harness.engine.load()
    assert (load.prefill_tokens, load.decode_tokens) == (12, 1)
    assert load.requests.running == 3
    harness.drain()
    load = harness.engine.load()
    assert (load.prefix_queries, load.prefix_hits) == (48, 12)
    assert (load.requests.accepted, load.requests.completed, load.requests.running) == (3, 3, 0)


def test_the_seconds_of_host_and_of_waiting_come_from_the_clock() -> None:
    harness = Harness(step_ahead=False)
    harness.submit(request("r", [1], 1))
    harness.step()
    # Four looks at a clock that moves 1 ms each time: one interval of the three is the wait.
    assert harness.engine.stats.wait_seconds == pytest.approx(0.001)
    assert harness.engine.stats.host_seconds == pytest.approx(0.002)


def test_the_ledgers_notice_what_is_wrong() -> None:
    harness = Harness()
    harness.submit(request("r", PROMPT, 20))
    harness.step()
    roster = harness.engine.roster
    sequence = roster.live["r"]
    block = sequence.blocks.pop()
    with pytest.raises(AssertionError, match="holds 3 blocks, needs 4"):
        harness.engine.check_ledgers()
    sequence.blocks.append(block)
    roster.stats.completed += 1
    with pytest.raises(AssertionError, match="request ledger"):
        harness.engine.check_ledgers()
    roster.stats.completed -= 1
    roster.backlog += 1
    with pytest.raises(AssertionError, match="backlog"):
        harness.engine.check_ledgers()
    roster.backlog -= 1
    del roster.residents.decoding[sequence]
    with pytest.raises(AssertionError):
        harness.engine.check_ledgers()
    roster.residents.decoding[sequence] = None
    harness.drain()


def test_known_ids_are_prompt_and_resumed() -> None:
    asked: EngineRequest = request("r", [1, 2], resumed_ids=(3,))
    harness = Harness()
    harness.submit(asked)
    harness.step()
    new = harness.executor.plans[0].added[0]
    assert (new.token_ids[:3], new.num_prompt) == ((1, 2, 3), 2)
