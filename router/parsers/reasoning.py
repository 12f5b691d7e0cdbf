"""Thoughts before the answer, as `<think>...</think>`; of several families under several names."""

from __future__ import annotations

from dataclasses import dataclass

from router.parsers.pieces import Parser, Piece, Pieces, Reasoning, held_back


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands around the thoughts. `opens`: whether the answer begins in them, its template having opened them."""

    begin: str
    end: str
    opens: bool


REASONING_PARSERS: dict[str, Marks] = {
    "deepseek_r1": Marks("<think>", "</think>", True),
    "qwen3": Marks("<think>", "</think>", False),
    "granite": Marks("Here is my thought process:", "Here is my response:", False),
    "mistral": Marks("[THINK]", "[/THINK]", False),
}


def reasoning_of(template: str) -> str | None:
    """The parser for models whose chat template this is; None where it shows no thoughts."""
    if "</think>" not in template:
        return "mistral" if "[THINK]" in template else None
    return "qwen3"


class ReasoningParser:
    """Thoughts first, then what `rest` makes of the answer. `inside`: the prompt has opened them already.

    Not `shown`: they are left out.
    """

    def __init__(self, marks: Marks, rest: Parser, *, inside: bool, shown: bool = True) -> None:
        self._marks, self._rest, self._shown = marks, rest, shown
        self._state = "inside" if inside or marks.opens else "before"
        self._buffer = ""
        self._spaces = ""
        self._fresh = True  # no thought has been shown, or nothing of the answer

    def push(self, text: str) -> Pieces:
        """See `Parser`."""
        if self._state == "after":
            return self._after(text)
        self._buffer += text
        if self._state == "before" and not self._look_for_begin():
            return self._answer_at_once() if self._state == "after" else []
        return self._look_for_end()

    def flush(self) -> Pieces:
        """See `Parser`."""
        pieces: Pieces = []
        rest, self._buffer = self._buffer, ""
        if self._state == "inside":
            pieces += self._thoughts(rest)
        elif rest:
            pieces += self._rest.push(rest)
        return pieces + self._rest.flush()

    def _look_for_begin(self) -> bool:
        """Whether the thoughts have begun."""
        text, begin = self._buffer.lstrip(), self._marks.begin
        if begin.startswith(text):  # or nothing yet
            if text != begin:
                return False
        elif not text.startswith(begin):
            self._state = "after"
            return False
        self._buffer, self._state = text[len(begin) :], "inside"
        return True

    def _answer_at_once(self) -> Pieces:
        text, self._buffer, self._fresh = self._buffer, "", False
        return self._rest.push(text)

    def _look_for_end(self) -> Pieces:
        if self._fresh and self._buffer.lstrip().startswith(self._marks.begin):  # opened twice: by prompt and model
            self._buffer = self._buffer.lstrip()[len(self._marks.begin) :]
        thoughts, found, answer = self._buffer.partition(self._marks.end)
        if found:
            self._buffer, self._state = "", "after"
            pieces = self._thoughts(thoughts)
            self._fresh = True
            return pieces + self._after(answer)
        held = max(held_back(self._buffer, self._marks.end), self._opening())
        end = len(self._buffer) - held
        shown, self._buffer = self._buffer[:end], self._buffer[end:]
        return self._thoughts(shown)

    def _opening(self) -> int:
        """All of it, while it may be a second opening mark."""
        begun = self._buffer.lstrip()
        return len(self._buffer) if self._fresh and self._marks.begin.startswith(begun) else 0

    def _thoughts(self, text: str) -> Pieces:
        text = self._spaces + text
        if self._fresh:
            text = text.lstrip("\n")
        kept = text.rstrip("\n")
        self._spaces = text[len(kept) :] if kept or not self._fresh else ""
        if not kept:
            return []
        self._fresh = False
        piece: Piece = Reasoning(kept)
        return [piece] if self._shown else []

    def _after(self, text: str) -> Pieces:
        if self._fresh:
            text = text.lstrip()
            if not text:
                return []
            self._fresh = False
        return self._rest.push(text)
