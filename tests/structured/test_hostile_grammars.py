"""Grammars that are made to cost: refused at the front, or bounded step by step, and nobody else's trouble."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import llguidance
import pytest
from one_process import DEMO, demo_engine

from router.text.grammars import GrammarChecks
from workers.api.grammar import GrammarKind, GrammarSpec, parser_limits
from workers.api.request import INVALID, EngineRequest, FinishReason, SamplingParams
from workers.engine.core import Engine
from workers.engine.grammar import Grammars
from workers.rank import run_to_completion

END = 1
COUNTED = GrammarSpec(GrammarKind.REGEX, "[a-z ]*a[a-z ]{200}X")  # a state for each set of places where an "a" stood


def words(count: int, length: int) -> list[str]:
    random = Random(5)
    return ["".join(random.choices("abcdefgh", k=length)) for _ in range(count)]


def nested(part: str, times: int) -> str:
    before, after = part.split("%")
    return before * times + "{}" + after * times


RUNS = {
    "items without end": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    "items that must be": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "long strings": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "a great enum": {"enum": words(3000, 16)},
    "many ways": {"anyOf": [{"const": i} for i in range(3000)]},
    "many objects": {"anyOf": [{"type": "object", "properties": {w: {}}, "required": [w]} for w in words(200, 8)]},
    "itself": {"$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/n"}}]}},
               "$ref": "#/$defs/n"},
    "powers": GrammarSpec(GrammarKind.REGEX, "(a{1,1000}){1,1000}"),
    "a place to remember": GrammarSpec(GrammarKind.REGEX, "[ab]*a[ab]{15}c"),
    "places to remember": COUNTED,
    "many meanings": GrammarSpec(GrammarKind.LARK, 'start: e\ne: e e | e e e | "a" | "b"'),
    "all at once": GrammarSpec(GrammarKind.REGEX, "|".join(f"[a-z]*{word}[a-z]*" for word in words(40, 6))),
}  # fmt: skip
REFUSED = {
    "ten thousand ways": (
        {"anyOf": [{"type": "array", "items": {"const": w}} for w in words(10_000, 3)]},
        "over 131072",
    ),
    "powers of powers": (GrammarSpec(GrammarKind.REGEX, "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"), "too many"),
    "many keys": (
        {"type": "object", "properties": {w: {"type": "string"} for w in words(2500, 12)}},
        "Current row has",
    ),
    "deep": (nested('{"type":"object","properties":{"a":%}}', 200), "too deeply"),
    "deeper": (nested('{"items":%}', 9000), "too deeply"),
    "brackets": (GrammarSpec(GrammarKind.LARK, "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply"),
}


def spec_of(asked: object) -> GrammarSpec:
    if isinstance(asked, GrammarSpec):
        return asked
    return GrammarSpec(GrammarKind.JSON_SCHEMA, asked if isinstance(asked, str) else json.dumps(asked))


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars.of_folder(DEMO, 1024)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with demo_engine(threaded=False) as made:
        yield made


@pytest.mark.parametrize("name", list(RUNS))
def test_what_the_front_lets_through_has_masks_or_an_error(name: str, grammars: Grammars) -> None:
    spec = spec_of(RUNS[name])
    assert GrammarChecks().fault(spec) is None
    state = grammars.state(spec, (END,), 0, 100)
    random, new = Random(1), ()
    for _ in range(30):
        bits = grammars.mask(state, new)
        allowed = [i for i in range(1024) if bits[i >> 3] >> (i & 7) & 1]
        assert bool(allowed) == (state.error is None)
        if not allowed or allowed == [END]:
            break
        new = (random.choice(allowed),)


@pytest.mark.parametrize("name", list(REFUSED))
def test_the_rest_is_refused_at_the_front(name: str) -> None:
    asked, words_ = REFUSED[name]
    spec = spec_of(asked)
    fault = GrammarChecks().fault(spec)
    assert fault is not None
    assert words_ in fault.words


@pytest.mark.parametrize("limit", ["max_lexer_states", "step_lexer_fuel", "step_max_items"])
def test_a_grammar_that_grows_too_large_ends_its_request_with_an_error(
    limit: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never as if it had come to its end; the others draw what they draw without it."""
    usual = parser_limits()
    names = ("initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states", "max_grammar_size")
    low = {"max_lexer_states": 3000, "step_lexer_fuel": 600, "step_max_items": 60}
    few = llguidance.LLParserLimits(
        **{name: low[limit] if name == limit else getattr(usual, name) for name in names}, verbose_errors=False
    )
    monkeypatch.setattr("workers.engine.grammar.parser_limits", lambda: few)
    grows = COUNTED if limit != "step_max_items" else GrammarSpec(GrammarKind.LARK, 'start: e\ne: e e | e e e | "a"')
    sound = GrammarSpec(GrammarKind.REGEX, "[a-z]{2,9}( [a-z]{2,9}){3}" if limit != "step_max_items" else "[a-z]{2,9}")

    def ask(name: str, grammar: GrammarSpec | None) -> EngineRequest:
        params = SamplingParams(60, seed=3, stop_ids=(END,), min_tokens=50 if name == "grows" else 0)
        return EngineRequest(name, (17, 18, 19), params, grammar=grammar)

    others = [ask("sound", sound), ask("plain", None)]
    alone = run_to_completion(engine, others)
    tokens: dict[str, list[int]] = {}
    ends = {}
    for request in (*others, ask("grows", grows)):
        tokens[request.id] = []
        engine.submit(request)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish is not None:
                ends[delta.request_id] = delta
    assert ends["grows"].finish is FinishReason.ERROR
    assert (ends["grows"].error or "").startswith(f"{INVALID}the grammar is too complex")
    assert END not in tokens["grows"]
    assert {name: tokens[name] for name in alone} == alone
