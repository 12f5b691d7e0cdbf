"""What an answer must look like (`GrammarSpec`), and how llguidance is told so.

A spec is text and flags, nothing compiled: it crosses processes, and what it allows after some tokens follows from the
spec and these tokens alone. Whoever checks a spec and whoever runs it take the grammar from here.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from workers.api.errors import InvalidRequest

SPACES = "[ ]?"  # between the tokens of JSON, unless a request says otherwise
MOST_SOURCE = 128 << 10  # characters


class GrammarKind(enum.StrEnum):
    """What `GrammarSpec.source` is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the regex crate, over the whole answer
    LARK = "lark"  # in llguidance's dialect


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The answer is a sentence of this grammar.

    `spaces` is a regex for what may stand between the tokens of JSON ("" = nothing). With `begins_after` the grammar
    begins behind the first occurrence of that text in the answer; until there any token but a stop id may be drawn.
    When no more than `wrap_up` tokens are left of `max_tokens`, only what leads to the end soon is allowed, where there
    is a choice (0 = never).
    """

    kind: GrammarKind
    source: str
    spaces: str = SPACES
    begins_after: str = ""
    wrap_up: int = 0


@cache
def parser_limits() -> Any:
    """llguidance's bounds on one grammar and on one step of it. At most about 8 ms of work a step."""
    import llguidance

    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=50_000,
        max_lexer_states=100_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # they would show the schema
    )


def llguidance_grammar(spec: GrammarSpec) -> str:
    """The grammar of `spec` as llguidance takes it, without `begins_after`. Raises InvalidRequest."""
    if len(spec.source) > MOST_SOURCE:
        raise InvalidRequest(f"a grammar of {len(spec.source)} characters is over {MOST_SOURCE}")
    from llguidance import LLMatcher

    if spec.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(spec.source)
    if spec.kind is GrammarKind.LARK:
        return LLMatcher.grammar_from_lark(spec.source)
    try:
        return LLMatcher.grammar_from_json_schema(json.loads(spec.source), overrides=json_options(spec.spaces))
    except RecursionError as e:
        raise InvalidRequest("it is nested too deeply") from e
    except ValueError as e:
        raise InvalidRequest(f"not a JSON schema: {e}") from e


def json_options(spaces: str) -> Any:
    """llguidance's options of a schema; they win over those that the schema itself names."""
    spaced: dict[str, Any] = {"whitespace_pattern": spaces} if spaces else {"whitespace_flexible": False}
    return {**spaced, "item_separator": ",", "key_separator": ":", "lenient": False, "coerce_one_of": False}
