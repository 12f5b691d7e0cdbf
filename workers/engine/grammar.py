"""Grammars at work: compiled once, and for each sequence that has one, which tokens may come next.

What a sequence may draw follows from its spec, its limits and the tokens it has emitted, nothing else: a preempted one,
or one replayed on another replica, meets the same masks. Compiling takes up to a second and is done ahead of `submit`,
in another thread; a mask takes some 10 us where the grammar has been at this place or few tokens are in question, and
milliseconds where a large vocabulary is gone through (a string with a pattern, or near its `maxLength`).

Shapes: V vocabulary; a mask is V bits, in words of 32, lowest first.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from workers.api.errors import ConfigError, InvalidRequest
from workers.api.grammar import GrammarKind, GrammarSpec, llguidance_grammar, parser_limits
from workers.engine.grammar_state import GrammarState
from workers.engine.vocabulary import Vocabulary
from workers.engine.wrap_up import Closers

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

log = logging.getLogger("echelon.grammar")

MOST_COMPILED = 64
_MOST_THREADS = 16  # that compute masks


class Grammars:
    """The grammars of one model, whose tokenizer is `tokenizer` (the text of a tokenizer.json), over `vocab_size` ids.

    Thread-safe. The vocabulary is looked through by `prepare`, or with the first grammar: seconds for a
    large one, in which no other Python code of the process runs. Where llguidance is not installed, or cannot take the
    tokenizer apart into bytes, it is the requests that are refused.
    """

    def __init__(self, tokenizer: str, vocab_size: int) -> None:
        self._source = tokenizer
        self.vocab_size = vocab_size
        self.words = -(-vocab_size // 32)
        self._nothing = bytes(self.words * 4)
        self._compiled: OrderedDict[GrammarSpec, LLMatcher | str] = OrderedDict()
        self._lock = threading.Lock()
        self._at_beginning = lru_cache(MOST_COMPILED)(self._show_at_beginning)  # the first masks of the same grammars

    @classmethod
    def of_folder(cls, folder: str | Path, vocab_size: int) -> Grammars:
        """Those of a checkpoint in the Hugging Face layout. Raises ConfigError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"no structured output: {folder} has no tokenizer.json")
        return cls(path.read_text("utf-8"), vocab_size)

    def prepare(self) -> str:
        """The vocabulary is looked through; returns why that cannot be: grammars will be refused for it. Else ""."""
        try:
            _ = self._vocabulary, self._closers
        except InvalidRequest as e:
            return f"no structured output with this tokenizer: {e.message}"
        except Exception as e:  # whatever the library raises of a tokenizer
            return f"no structured output with this tokenizer: {e}"
        return ""

    def compile(self, spec: GrammarSpec) -> None:
        """`state` of this spec will be quick. A spec that cannot be compiled is remembered, too."""
        self._prototype(spec)

    def is_compiled(self, spec: GrammarSpec) -> bool:
        """Whether `state` has nothing to compile."""
        with self._lock:
            return _key(spec) in self._compiled

    def state(self, spec: GrammarSpec, stop_ids: Collection[int], min_tokens: int, max_tokens: int) -> GrammarState:
        """For a sequence that has emitted nothing. Raises InvalidRequest for a spec that is no grammar."""
        found = self._prototype(spec)
        if isinstance(found, str):
            raise InvalidRequest(f"the grammar cannot be compiled: {found}", param="structured_outputs")
        return GrammarState(spec, found.deep_copy(), self._vocabulary, stop_ids, min_tokens, max_tokens)

    def mask(self, state: GrammarState, new: Sequence[int]) -> bytes:
        """What a sequence may draw that goes on with the tokens `new`."""
        return self.masks([(state, new)])[0]

    def masks(self, rows: Sequence[tuple[GrammarState, Sequence[int]]]) -> list[bytes]:
        """What sequences may draw, each after tokens that its state has not seen. A state is in one call at a time."""
        size, wide = self.words * 4, -(-self._tokenizer.vocab_size // 32) * 4
        bits = bytearray(wide * len(rows))
        begun = self._follow(rows)
        self._compute(begun, bits, wide, len(rows))
        whole = memoryview(bits)
        masks = [whole[i * wide : i * wide + size] for i in range(len(rows))]  # the model may have fewer tokens
        for i, state in begun:
            try:
                self._finish(masks[i], state)
            except Exception as e:  # whatever the library raises: it ends this request, and no other
                log.exception("a mask could not be completed")
                state.error = str(e)
                masks[i][:] = self._nothing
        return [
            bytes(mask) if state.has_begun else state.before(size) for mask, (state, _) in zip(masks, rows, strict=True)
        ]

    def _follow(self, rows: Sequence[tuple[GrammarState, Sequence[int]]]) -> list[tuple[int, GrammarState]]:
        """All states have seen their tokens; returns those whose grammars have begun, by row."""
        begun: list[tuple[int, GrammarState]] = []
        drawn: list[tuple[GrammarState, int]] = []
        for i, (state, new) in enumerate(rows):
            if state.count and state.has_begun and len(new) == 1 and state.error is None:  # nearly all
                state.count += 1
                drawn.append((state, new[0]))
            else:
                state.follow(new)
            if state.has_begun:
                begun.append((i, state))
        if drawn:
            taken = self._executor.consume_token_par([(state.matcher, token) for state, token in drawn])
            for (state, _), well in zip(drawn, taken, strict=True):
                if not well:
                    state.fail()
        return begun

    def _compute(self, begun: list[tuple[int, GrammarState]], bits: bytearray, size: int, rows: int) -> None:
        """What the grammars allow, into `bits`; a state whose mask cannot be computed has an error afterwards."""
        at_work = [(state.matcher, i) for i, state in begun if state.error is None]
        if not at_work:
            return
        memory = (ctypes.c_char * len(bits)).from_buffer(bits)
        self._executor.unsafe_compute_mask_ptr(at_work, ctypes.addressof(memory), size, rows)
        del memory
        for _, state in begun:
            if state.error is None and state.matcher.is_error():
                state.fail()

    def _prototype(self, spec: GrammarSpec) -> LLMatcher | str:
        key = _key(spec)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        made = self._compile(key)
        with self._lock:
            self._compiled[key] = made
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return made

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._source, self.vocab_size)

    @property
    def _tokenizer(self) -> LLTokenizer:
        return self._vocabulary.tokens

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(num_threads=max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) * 3 // 4)))

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(self._tokenizer.eos_tokens)

    @cached_property
    def _closers(self) -> Closers:
        return Closers(self._tokenizer, self.words * 32)

    def _compile(self, spec: GrammarSpec) -> LLMatcher | str:
        try:
            from llguidance import LLMatcher

            if words := self.prepare():
                return words
            matcher = LLMatcher(self._tokenizer, llguidance_grammar(spec), log_level=0, limits=parser_limits())
        except InvalidRequest as e:
            return e.message
        except Exception as e:  # whatever the library raises of a grammar
            return str(e)
        if not matcher.is_error():
            first = matcher.compute_bitmask()  # the first one builds most of the lexer
            if self._vocabulary.at_beginning:
                self._at_beginning(first[: self.words * 4])
        return matcher.get_error() or matcher

    def _show_at_beginning(self, row: bytes) -> bytes:
        """What may come where a text begins, of what may come inside of one."""
        found = bytearray(row)
        for token, same in self._vocabulary.at_beginning.items():
            if token < self.vocab_size:
                found[token >> 3] &= ~(1 << (token & 7)) & 0xFF
                if same is not None and all(row[one >> 3] >> (one & 7) & 1 for one in same):
                    found[token >> 3] |= 1 << (token & 7)
        return bytes(found)

    def _finish(self, row: memoryview, state: GrammarState) -> None:
        """Stop ids may be drawn where the grammar accepts, and whatever llguidance takes for them may not."""
        if state.error is not None:
            row[:] = self._nothing
            return
        if state.begins and self._vocabulary.at_beginning:
            row[:] = self._at_beginning(bytes(row))
        accepts = any(end // 8 < len(row) and row[end >> 3] >> (end & 7) & 1 for end in self._ends)
        for token in (*self._ends, *state.stop_ids):
            if token < self.vocab_size:
                row[token >> 3] &= ~(1 << (token & 7)) & 0xFF
        hurried = state.left <= state.spec.wrap_up
        if accepts and (state.count >= state.min_tokens or hurried or bytes(row) == self._nothing):
            if hurried:
                row[:] = self._nothing
            for token in state.stop_ids:
                row[token >> 3] |= 1 << (token & 7)
        elif hurried and state.spec.kind is GrammarKind.JSON_SCHEMA:
            self._closers.narrow(row)


def _key(spec: GrammarSpec) -> GrammarSpec:
    return replace(spec, begins_after="", wrap_up=0)
