"""Requests to the demo model that have grammars."""

from __future__ import annotations

import json

import tokenizers
from one_process import DEMO

from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, SamplingParams

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
