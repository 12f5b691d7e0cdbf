"""Requests to the demo model that have grammars, and an engine that preempts them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import tokenizers
from one_process import DEMO

from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.engine.sequence import Sequence

END = 1
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 7, "maximum": 9}, "pets": {"enum": ["cat", "dog", None]}},
    "required": ["age", "pets"],
    "additionalProperties": False,
}
OBJECT = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
WORDS = GrammarSpec(GrammarKind.REGEX, "[a-z]{2,9}( [a-z]{2,9}){3}")
TEXT = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def ask(name: str, grammar: GrammarSpec | None, prompt: str = "One day Ida met", **sampling: object) -> EngineRequest:
    params = {"max_tokens": 60, "seed": len(name), "stop_ids": (END,), **sampling}
    return EngineRequest(name, tuple(TEXT.encode(prompt).ids), SamplingParams(**params), grammar=grammar)  # type: ignore


def often_preempting(engine: Engine) -> Callable[[], tuple[list[Sequence], bool]]:
    """For its scheduler's `_make_room`: every third step a sequence with a grammar is preempted, if there is one."""
    residents, calls, make_room = engine.roster.residents, itertools.count(), engine._scheduler._make_room

    def made() -> tuple[list[Sequence], bool]:
        decodes, preempted = make_room()
        victims = [s for s in residents.decoding if s.grammar is not None]
        if next(calls) % 3 or not victims:
            return decodes, preempted
        engine.roster.preempt(victims[-1])
        return list(residents.decoding), True

    return made
