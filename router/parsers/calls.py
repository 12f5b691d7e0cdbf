"""Tool calls in the text of an answer, as the families of models write them.

hermes (Qwen, Hermes)   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once a call
mistral                 [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name{...}, name[ARGS]{...}
internlm                <|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>
deepseek                <｜tool▁call▁begin｜>function<｜tool▁sep｜>name, a JSON block, <｜tool▁call▁end｜>;
                        or <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
llama3_json             the whole answer is {"name": ..., "parameters": {...}}, several separated by ";"
pythonic                the whole answer is [name(key=value, ...), ...]
"""

from __future__ import annotations

import ast
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from router.parsers.json_call import JsonCall, JsonValue
from router.parsers.pieces import Arguments, CallBegins, Content, Parser, Pieces, held_back

NameOf = Callable[[str], str | None]  # of what stands before an object: the call's name; None: the object holds it


@dataclass(frozen=True, slots=True)
class Family:
    """How calls are marked. Without `begin` the whole answer is calls, if it starts with one of `starts`."""

    begin: str = ""
    end: str = ""
    name_of: NameOf = lambda header: None
    starts: tuple[str, ...] = ()
    id_length: int = 24
    shown_by: tuple[str, ...] = ()  # what a chat template of the family holds

    @property
    def markers(self) -> tuple[str, ...]:
        """Special strings that have to be seen."""
        return (self.begin, self.end, *self.starts, *self.shown_by)


def _mistral_name(header: str) -> str | None:
    found = re.search(r"([A-Za-z_][\w.-]*)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*$", header)
    return found[1] if found else None


def _deepseek_name(header: str) -> str | None:
    before, _, after = header.rpartition("<｜tool▁sep｜>")
    named = after.replace("```json", "").strip()
    return named or before.rpartition("<｜tool▁call▁begin｜>")[2].strip() or None


FAMILIES: dict[str, Family] = {
    "hermes": Family("<tool_call>", "</tool_call>", shown_by=("<tool_call>",)),
    "mistral": Family(
        "[TOOL_CALLS]", name_of=_mistral_name, id_length=9, shown_by=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    ),
    "internlm": Family("<|action_start|>", "<|action_end|>", shown_by=("<|action_start|>", "<|plugin|>")),
    "deepseek": Family(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", name_of=_deepseek_name,
        shown_by=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
    "llama3_json": Family(starts=("{", "<|python_tag|>"), shown_by=("<|python_tag|>",)),
}  # fmt: skip
PYTHONIC = "pythonic"
REQUIRED = Family(starts=("[",))  # what the grammar of a required call makes: a list of calls, and nothing else
TOOL_PARSERS = (*FAMILIES, PYTHONIC)


def family_of(template: str) -> str | None:
    """The parser for models whose chat template this is; None where it shows none of the marks."""
    return next((name for name, f in FAMILIES.items() if f.shown_by and f.shown_by[0] in template), None)


def tool_parser(name: str, *, parallel: bool = True) -> Parser:
    """A fresh parser of the family. With `parallel` false calls after the first are dropped."""
    return PythonicCalls(parallel=parallel) if name == PYTHONIC else MarkedCalls(FAMILIES[name], parallel=parallel)


class _Calls:
    """Numbers calls and gives them ids."""

    def __init__(self, *, parallel: bool, id_length: int = 24) -> None:
        self._parallel, self._id_length = parallel, id_length
        self.count = 0

    def begin(self, name: str) -> Pieces:
        """A call of that name."""
        self.count += 1
        if self.count > 1 and not self._parallel:
            return []
        random = uuid.uuid4().hex[: self._id_length]
        call_id = random if self._id_length == 9 else f"call_{random}"  # mistral's templates want nine characters
        return [CallBegins(self.count - 1, call_id, name)]

    def arguments(self, text: str) -> Pieces:
        """Of the call begun last."""
        return [Arguments(self.count - 1, text)] if text and (self.count == 1 or self._parallel) else []


class MarkedCalls:
    """Objects behind a mark; what stands outside is content."""

    def __init__(self, family: Family, *, parallel: bool = True) -> None:
        self._family = family
        self._calls = _Calls(parallel=parallel, id_length=family.id_length)
        self._buffer = ""  # not looked at
        self._spaces = ""  # content's last spaces: dropped where a call follows
        self._inside = False
        self._header = ""  # inside, ahead of an object
        self._found = False  # an object, since the mark
        self._started = not family.starts  # whether it is known that calls may come
        self._object: JsonValue | None = None
        self._begun = False  # the object's call has been told

    def push(self, text: str) -> Pieces:
        """See `Parser`."""
        self._buffer += text
        pieces: Pieces = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> Pieces:
        """See `Parser`."""
        pieces = self.push("")
        if self._inside:
            rest = self._header if not self._found and self._object is None else ""
            if self._object is not None and not self._begun:
                rest += self._object.text
            pieces += self._content(self._family.begin + rest if rest else "")
        pieces += self._content(self._buffer)
        self._buffer = ""
        if not self._calls.count and self._spaces:
            pieces.append(Content(self._spaces))
        return pieces

    def _content(self, text: str) -> Pieces:
        text = self._spaces + text
        kept = text.rstrip()
        self._spaces = text[len(kept) :]
        return [Content(kept)] if kept else []

    def _step(self, pieces: Pieces) -> bool:
        """Whether there is more to do."""
        if self._object is not None:
            return self._go_on(self._object, pieces)
        if self._inside:
            return self._look_for_object(pieces)
        if not self._started:
            return self._look_at_start(pieces)
        begin = self._family.begin
        before, found, after = self._buffer.partition(begin) if begin else (self._buffer, "", "")
        if found:
            pieces += self._content(before)
            self._buffer, self._inside, self._header, self._found = after, True, "", False
            return True
        held = held_back(self._buffer, begin)
        end = len(self._buffer) - held
        pieces += self._content(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _look_at_start(self, pieces: Pieces) -> bool:
        text = self._buffer.lstrip()
        starts = self._family.starts
        if not text or any(start != text and start.startswith(text) for start in starts):
            return False
        self._started = True
        for start in starts:
            if text.startswith(start):
                self._inside = True
                self._buffer = text if start == "{" else text[len(start) :]
                break
        return True

    def _look_for_object(self, pieces: Pieces) -> bool:
        text, end = self._buffer, self._family.end
        at = text.find("{")
        closed = text.find(end) if end else -1
        if closed >= 0 and (at < 0 or closed < at):
            if not self._found:  # no call at all
                pieces += self._content(self._family.begin + self._header + text[:closed] + end)
            self._buffer, self._inside, self._header = text[closed + len(end) :], False, ""
            return True
        if at < 0:
            held = held_back(text, end) if end else 0
            self._header += text[: len(text) - held]
            self._buffer = text[len(text) - held :]
            return False
        self._header += text[:at]
        self._buffer, self._begun = text[at:], False
        name = self._family.name_of(self._header)
        if name is None:
            self._object = JsonCall()
        else:
            self._object = JsonValue()
            self._begin(name, pieces)
        return True

    def _begin(self, name: str, pieces: Pieces) -> None:
        pieces += self._calls.begin(name)
        self._begun = self._found = True

    def _go_on(self, found: JsonValue, pieces: Pieces) -> bool:
        seen = len(found.text)
        self._buffer = found.push(self._buffer)
        if isinstance(found, JsonCall):
            if not self._begun and found.name is not None and (found.has_arguments or found.done):
                self._begin(found.name, pieces)
            if self._begun:
                pieces += self._calls.arguments(found.take_arguments())
        else:
            pieces += self._calls.arguments(found.text[seen:])
        if not found.done:
            return False
        if isinstance(found, JsonCall):
            if not self._begun:
                pieces += self._content(found.text)
            elif not found.has_arguments:
                pieces += self._calls.arguments("{}")
        self._object, self._header = None, ""
        return bool(self._buffer)


class NamedCall:
    """The whole answer is the arguments of one function, as its grammar had it."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, _Calls(parallel=True)

    def push(self, text: str) -> Pieces:
        """See `Parser`."""
        pieces = self._calls.begin(self._name) if text and not self._calls.count else []
        return pieces + self._calls.arguments(text)

    def flush(self) -> Pieces:
        """Nothing is held."""
        return []


class PythonicCalls:
    """Told at the end: what Python's grammar makes of `[f(a=1)]` is known only then."""

    def __init__(self, *, parallel: bool = True) -> None:
        self._calls = _Calls(parallel=parallel)
        self._text = ""
        self._may_be = True

    def push(self, text: str) -> Pieces:
        """See `Parser`."""
        self._text += text
        begun = self._text.lstrip()
        if self._may_be and (not begun or begun[0] == "["):
            return []
        self._may_be = False
        shown, self._text = self._text, ""
        return [Content(shown)] if shown else []

    def flush(self) -> Pieces:
        """See `Parser`."""
        shown, self._text = self._text, ""
        if not shown:
            return []
        try:
            calls = _python_calls(shown)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [Content(shown)]
        pieces: Pieces = []
        for name, arguments in calls:
            pieces += self._calls.begin(name) + self._calls.arguments(json.dumps(arguments, ensure_ascii=False))
        return pieces


def _python_calls(text: str) -> list[tuple[str, dict[str, object]]]:
    """Raises ValueError or SyntaxError for anything but a list of calls with plain values by keyword."""
    tree = ast.parse(text.strip(), mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    calls = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("no call by keywords")
        values = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        json.dumps(values)
        calls.append((ast.unparse(node.func), values))
    return calls
