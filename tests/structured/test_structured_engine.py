"""Grammars in the engine: what is drawn obeys them, and depends on the spec and the tokens before alone."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import jsonschema
import pytest
from one_process import DEMO, demo_engine
from structured_asks import END, OBJECT, SCHEMA, TEXT, WORDS, ask, often_preempting

from workers.api.channel import dial
from workers.api.errors import ConfigError, InvalidRequest
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.replica import ReplicaInfo
from workers.api.request import EngineRequest, FinishReason
from workers.api.wire import ENGINE_CODEC, Abort, FrameCodec, FrameSplitter, StepFrame, Submit
from workers.engine.core import Engine
from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState
from workers.engine.mask_jobs import MaskedRow, MaskJobs
from workers.engine.plan import StepMasks, StepPlan
from workers.rank import run_to_completion
from workers.replica import EngineServer


def text(ids: list[int]) -> str:
    return TEXT.decode(ids)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with demo_engine(threaded=False) as made:
        yield made


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars.of_folder(DEMO, 1024)


def mixed() -> list[EngineRequest]:
    asked = [ask(f"o{i}", OBJECT, seed=i) for i in range(3)] + [ask(f"w{i}", WORDS, seed=i) for i in range(3)]
    plain = [ask(f"p{i}", None, seed=i, max_tokens=40) for i in range(2)]
    return [*asked[:2], *plain, *asked[2:], ask("g", WORDS, temperature=0.0, repetition_penalty=1.3, top_k=5)]


@pytest.fixture(scope="module")
def answers(engine: Engine) -> dict[str, list[int]]:
    return run_to_completion(engine, mixed())


def test_answers_obey_their_grammars(answers: dict[str, list[int]]) -> None:
    for name, ids in answers.items():
        if name[0] == "o":
            jsonschema.validate(json.loads(text(ids)), SCHEMA)
        elif name[0] in "wg":
            assert re.fullmatch(WORDS.source, text(ids))
        if name[0] != "p":
            assert ids[-1] == END
            assert END not in ids[:-1]


@pytest.mark.parametrize("how", ["threaded", "one step at a time"])
def test_how_steps_run_changes_no_token(how: str, answers: dict[str, list[int]]) -> None:
    with demo_engine(threaded=how == "threaded", step_ahead=how == "threaded") as other:
        assert run_to_completion(other, mixed()) == answers


def test_preemption_changes_no_token(
    engine: Engine, answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._scheduler, "_make_room", often_preempting(engine))
    before = engine.stats.preemptions
    assert run_to_completion(engine, mixed()) == answers
    assert engine.stats.preemptions > before + 3


@pytest.mark.parametrize("name", ["o1", "w2", "g"])
def test_a_replay_goes_on_with_the_same_tokens(name: str, engine: Engine, answers: dict[str, list[int]]) -> None:
    (asked,) = [request for request in mixed() if request.id == name]
    for cut in (1, 3, len(answers[name]) - 1):
        resumed = replace(asked, id=f"{name}.{cut}", resumed_ids=tuple(answers[name][:cut]))
        assert run_to_completion(engine, [resumed])[resumed.id] == answers[name][cut:]


def test_others_are_neither_masked_nor_changed(engine: Engine, answers: dict[str, list[int]]) -> None:
    plans: list[StepPlan] = []
    submit = engine._executor.submit
    engine._executor.submit = lambda plan: plans.append(plan) or submit(plan)  # type: ignore
    try:
        alone = run_to_completion(engine, [request for request in mixed() if request.grammar is None])
    finally:
        del engine._executor.submit  # type: ignore[attr-defined]
    assert plans
    assert not [plan for plan in plans if plan.masked]
    assert alone == {name: ids for name, ids in answers.items() if name[0] == "p"}


def test_the_end_comes_where_the_grammar_accepts_and_at_once_where_it_can_only_stop(engine: Engine) -> None:
    yes = GrammarSpec(GrammarKind.REGEX, "(yes|no)")
    run = run_to_completion(engine, [ask("late", yes, min_tokens=30), ask("biased", yes, logit_bias=((END, -100.0),))])
    assert {text(ids) for ids in run.values()} <= {"yes", "no"}
    many = GrammarSpec(GrammarKind.REGEX, "[a-z]+")
    held, free = run_to_completion(
        engine, [ask("held", many, min_tokens=9, seed=3), ask("free", many, seed=3, logit_bias=((END, 100.0),))]
    ).values()
    assert len(held) > 9
    assert len(free) == 2  # a token that the grammar needs, then the end that the bias wants


def test_what_is_cut_ends_by_length(engine: Engine) -> None:
    engine.submit(ask("cut", OBJECT, max_tokens=4))
    while engine.has_work:
        last = engine.step()
    assert last[-1].finish is FinishReason.LENGTH


def test_json_wraps_up_before_the_limit(engine: Engine) -> None:
    strings = {f"text{i}": {"type": "string"} for i in range(3)}
    schema = {"type": "object", "properties": strings, "required": list(strings), "additionalProperties": False}
    endless = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    hurried = [ask(f"h{i}", replace(endless, wrap_up=60), seed=i, max_tokens=90) for i in range(3)]
    for name, ids in run_to_completion(engine, [*hurried, ask("cut", endless, max_tokens=90)]).items():
        assert (ids[-1] == END) == (name != "cut")
        if name != "cut":
            jsonschema.validate(json.loads(text(ids)), schema)


def test_the_grammar_begins_after_a_marker(engine: Engine) -> None:
    marked = replace(GrammarSpec(GrammarKind.REGEX, "[0-9]{3}"), begins_after=" said:")
    ids = run_to_completion(engine, [ask("m", marked, temperature=0.0)])["m"]
    before, found, after = text(ids).partition(" said:")
    assert before
    assert found
    assert re.fullmatch("[0-9]{3}", after)


def test_special_tokens_stay_outside(grammars: Grammars) -> None:
    state = grammars.state(GrammarSpec(GrammarKind.REGEX, r"(.|\n)*"), (END,), 0, 100)
    bits = grammars.mask(state, ())
    allowed = {i for i in range(1024) if bits[i // 8] >> i % 8 & 1}
    assert allowed & set(range(6)) == {END}
    assert len(allowed) > 900


def test_rows_at_once_are_rows_one_by_one(grammars: Grammars) -> None:
    def states() -> list[GrammarState]:
        specs = [OBJECT, WORDS, OBJECT, WORDS, replace(OBJECT, wrap_up=99), replace(WORDS, begins_after="<x>")]
        return [grammars.state(spec, (END, 9), 2, 100) for spec in specs]

    rows = [MaskedRow(slot, state, (), can_wait=False) for slot, state in enumerate(states())]
    together, late = MaskJobs(grammars).masks(
        3, [*rows, MaskedRow(9, None, (), can_wait=False)], patience=0, alone=False
    )
    alone = [grammars.mask(state, ()) for state in states()]
    assert together == StepMasks(3, (*range(6), 9), b"".join(alone) + b"\xff" * 128)
    assert not late


def test_a_grammar_that_fails_ends_its_request_alone(engine: Engine) -> None:
    engine.submit(ask("bad", WORDS))
    engine.submit(ask("good", OBJECT))
    engine.roster.live["bad"].grammar.error = "too complex"  # type: ignore[union-attr]
    ends = {}
    while engine.has_work:
        ends |= {d.request_id: d for d in engine.step() if d.finish is not None}
    assert ends["bad"].finish is FinishReason.ERROR
    assert "too complex" in (ends["bad"].error or "")
    assert ends["good"].finish is FinishReason.STOP


def test_what_cannot_be_compiled_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="unclosed"):
        engine.submit(ask("bad", GrammarSpec(GrammarKind.REGEX, "a(b")))
    with pytest.raises(InvalidRequest, match="ends it"):
        engine.submit(ask("endless", WORDS, stop_ids=()))
    with pytest.raises(InvalidRequest, match="no structured output with this tokenizer"):
        Grammars("{}", 10).state(WORDS, (END,), 0, 9)
    with pytest.raises(ConfigError, match="no tokenizer"):
        Grammars.of_folder("/nowhere", 10)


def test_specs_travel() -> None:
    asked = replace(ask("r", replace(OBJECT, begins_after="</think>", wrap_up=7)), resumed_ids=(4, 5))
    codec: FrameCodec = ENGINE_CODEC
    (body,) = FrameSplitter().feed(codec.encode(Submit((asked, ask("plain", None)))))
    assert codec.decode(body) == Submit((asked, ask("plain", None)))


async def test_grammars_are_compiled_beside_the_steps_and_aborts_wait_for_them(grammars: Grammars) -> None:
    """The first grammar is held up until another request has ended; one of the two that need it is aborted."""
    gate, ends, changed = threading.Event(), {}, asyncio.Event()

    class Client:
        def opened(self, channel: object) -> None: ...
        def closed(self, channel: object, reason: str) -> None: ...
        def received(self, channel: object, message: object) -> None:
            if isinstance(message, StepFrame):
                ends.update({d.request_id: d.finish for d in message.deltas if d.finish is not None})
                changed.set()

    async def until(*names: str) -> None:
        async with asyncio.timeout(20):
            while not set(names) <= ends.keys():
                changed.clear()
                await changed.wait()

    with demo_engine(threaded=False) as engine:
        compile_now = engine.grammars.compile  # type: ignore[union-attr]
        engine.grammars.compile = lambda spec: gate.wait(20) and compile_now(spec)  # type: ignore
        server = EngineServer(engine, ReplicaInfo("r", "m", "", 0, 2048, 8, num_blocks=9, block_size=16), "s")
        port = server.start("127.0.0.1").port
        stepping = threading.Thread(target=server.run)
        stepping.start()
        channel = await dial("127.0.0.1", port, codec=ENGINE_CODEC, secret="s", name="t", handler=Client())
        channel.send(Submit((ask("kept", WORDS), ask("dropped", WORDS, max_tokens=60))))
        channel.send(Abort(("dropped",)))
        channel.send(Submit((ask("other", None, max_tokens=5),)))
        await until("other")
        assert ends.keys() == {"other"}
        gate.set()
        await until("kept", "dropped")
        assert (ends["kept"], ends["dropped"]) == (FinishReason.STOP, FinishReason.ABORT)
        server.stop()
        await asyncio.to_thread(stepping.join, 20)
        assert not stepping.is_alive()
