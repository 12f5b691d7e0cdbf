"""Grammars over tokenizers that are not byte-level: it is the text that obeys, as the front decodes it."""

from __future__ import annotations

import json
import re
from functools import cache
from random import Random

import jsonschema
import other_tokenizers
import pytest
import tokenizers
from other_tokenizers import END

from router.text.tokenizer import Tokenizer
from workers.api.errors import InvalidRequest
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.engine.grammar import Grammars
from workers.engine.grammar_state import GrammarState

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["yes", " no ", "\u4e2d", "\u2581", "a\nb"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SPECS = {
    "json": GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    "words": GrammarSpec(GrammarKind.REGEX, "[a-h]{2,8}( [a-h]{2,8}){1,3}"),
    "space first": GrammarSpec(GrammarKind.REGEX, " (yes|no) ?"),
    "spaces": GrammarSpec(GrammarKind.REGEX, " {0,4}[a-c]{1,3} {2}[a-c]"),
    "no space": GrammarSpec(GrammarKind.REGEX, "[^ ]{3,9}"),
    "choice": GrammarSpec(GrammarKind.LARK, 'start: "yes" | " no" | "\u4f60\u597d" | "line\\nbreak"'),
}
MODELS = {
    "llama2": other_tokenizers.llama2,
    "metaspace": other_tokenizers.metaspace,
    "metaspace first": lambda: other_tokenizers.metaspace("first"),
    "metaspace never": lambda: other_tokenizers.metaspace("never"),
    "gemma": other_tokenizers.gemma,
    "unigram": other_tokenizers.unigram,
}
WITHOUT_BYTES = ("unigram",)  # cannot write every character


@cache
def made(name: str) -> tuple[tokenizers.Tokenizer, Grammars]:
    tokenizer = MODELS[name]()
    return tokenizer, Grammars(tokenizer.to_str(), tokenizer.get_vocab_size())


def drawn(grammars: Grammars, state: GrammarState, random: Random, first: tuple[int, ...] = ()) -> list[int]:
    """Tokens from all that the masks allow, to the end."""
    found, new = list(first), first
    while len(found) < 200:
        bits = grammars.mask(state, new)
        allowed = [i for i in range(grammars.vocab_size) if bits[i >> 3] >> (i & 7) & 1]
        assert allowed, state.error
        new = (random.choice(allowed),)
        if new[0] == END:
            return found
        found.append(new[0])
    raise AssertionError("no end")


def texts(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
    """As one answer and as a stream: the same."""
    front = Tokenizer(tokenizer, eos_ids=(END,))
    pieces = front.detokenizer()
    text = "".join([pieces.push([i]) for i in ids]) + pieces.flush()
    assert text == front.decode(ids)
    return text


def check(what: str, text: str) -> None:
    if what == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif what == "choice":
        assert text in {"yes", " no", "\u4f60\u597d", "line\nbreak"}
    else:
        assert re.fullmatch(SPECS[what].source, text), text


@pytest.mark.parametrize("what", list(SPECS))
@pytest.mark.parametrize("name", list(MODELS))
def test_texts_obey(name: str, what: str) -> None:
    if name == "unigram" and what in ("json", "choice"):
        pytest.skip("it has no bytes to write every character with")
    tokenizer, grammars = made(name)
    found = set()
    for seed in range(12):
        text = texts(tokenizer, drawn(grammars, grammars.state(SPECS[what], (END,), 0, 200), Random(seed)))
        check(what, text)
        found.add(text)
    assert len(found) > 1


@pytest.mark.parametrize("name", ["llama2", "metaspace", "unigram"])
def test_the_space_that_a_text_drops_is_no_part_of_it(name: str) -> None:
    """Models of this kind begin their answers with it: "\u2581yes" is as good a beginning as "yes"."""
    tokenizer, grammars = made(name)
    first = tokenizer.token_to_id("\u2581yes")
    state = grammars.state(GrammarSpec(GrammarKind.REGEX, "(yes|no) no"), (END,), 0, 200)
    bits = grammars.mask(state, ())
    assert bits[first >> 3] >> (first & 7) & 1
    assert texts(tokenizer, drawn(grammars, state, Random(1), (first,))) == "yes no"
    again = grammars.state(GrammarSpec(GrammarKind.REGEX, " (yes|no)"), (END,), 0, 200)
    grammars.mask(again, (first,))
    assert again.error is not None


@pytest.mark.parametrize("name", list(MODELS))
def test_inside_of_a_text_spaces_are_spaces(name: str) -> None:
    """Behind a marker the grammar begins, and nothing is dropped there."""
    tokenizer, grammars = made(name)
    spec = GrammarSpec(GrammarKind.REGEX, "[a-h]{2,4}( yes| no)", begins_after="yes")
    before = tuple(tokenizer.encode("no yes", add_special_tokens=False).ids)
    for seed in range(6):
        text = texts(tokenizer, drawn(grammars, grammars.state(spec, (END,), 0, 200), Random(seed), before))
        assert re.fullmatch("no yes[a-h]{2,4}( yes| no)", text), text


def test_words_without_spaces_are_no_vocabulary_for_grammars() -> None:
    tokenizer = other_tokenizers.wordpiece()
    grammars = Grammars(tokenizer.to_str(), tokenizer.get_vocab_size())
    assert "WordPiece" in grammars.prepare()
    with pytest.raises(InvalidRequest, match="do not stand for bytes of the text"):
        grammars.state(SPECS["words"], (END,), 0, 9)
