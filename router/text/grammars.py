"""Grammars that requests bring, checked at the front: what cannot be compiled, or costs too much, is refused here.

The check needs no tokenizer: it compiles the grammar over bytes, with the engine's limits.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from workers.api.errors import InvalidRequest
from workers.api.grammar import GrammarKind, GrammarSpec, llguidance_grammar, parser_limits

MOST_SECONDS = 1.0  # of processor time, for one grammar
MOST_KNOWN = 512
_MOST_LOOKS = 200  # at parts of a schema, to say which is at fault
_TRIAL_BYTES = 8  # of a sentence: limits may show after the first mask only
_END = 256
_TOO_DEEP = "it is nested too deeply"

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a grammar, in words, and where: the path from a schema's root to its part."""

    words: str
    inside: Path


class _Bytes:
    """A tokenizer of single bytes, as llguidance wants one."""

    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def _byte_tokenizer() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


class GrammarChecks:
    """Remembers what it has looked at. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[GrammarSpec, Fault | None] = OrderedDict()
        self._lock = threading.Lock()

    def fault(self, spec: GrammarSpec) -> Fault | None:
        """Why engines would not take it; None if they do. Costs up to a second for one that is new."""
        key = replace(spec, begins_after="", wrap_up=0)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        found = _look(key)
        with self._lock:
            self._known[key] = found
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return found


def _look(spec: GrammarSpec) -> Fault | None:
    began = time.thread_time()
    words = _fault(spec)
    if time.thread_time() - began > MOST_SECONDS:
        return Fault("it takes too long to compile", ())
    if not words:
        return None
    if spec.kind is not GrammarKind.JSON_SCHEMA:
        return Fault(words, ())
    try:
        schema = json.loads(spec.source)
        return Fault(words, _place(schema, lambda part: _fault(replace(spec, source=json.dumps(part))) == words))
    except (ValueError, RecursionError):
        return Fault(words, ())


def _fault(spec: GrammarSpec) -> str:
    from llguidance import LLMatcher

    try:
        grammar = llguidance_grammar(spec)
    except InvalidRequest as e:
        return e.message
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=parser_limits())
    for _ in range(_TRIAL_BYTES):
        if matcher.is_error():
            return _in_words(matcher.get_error())
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << _END) - 1)
        if not mask or matcher.is_error():
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    return _in_words(matcher.get_error()) if matcher.is_error() else ""


def _in_words(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip() and "<non-verbose/>" not in line]
    text = " ".join(" ".join(lines).split())
    if text.startswith("recursion limit exceeded"):
        return _TOO_DEEP
    return text[:300].rstrip(". ") or "it is no grammar"


def _place(schema: Any, fails: Callable[[Any], bool]) -> Path:
    """The path to the innermost part of `schema` that fails for the same reason by itself."""
    if not isinstance(schema, dict):
        return ()
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    found: Path = ()
    part, looks = schema, 0
    while True:
        for at, child in _children(part):
            looks += 1
            if looks > _MOST_LOOKS:
                return found
            if isinstance(child, dict) and fails({**shared, **child}):
                found, part = (*found, *at), child
                break
        else:
            return found


def _children(schema: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            for name, child in value.items():
                yield (key, name), child
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            for i, child in enumerate(value):
                yield (key, i), child
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            yield (key,), value
