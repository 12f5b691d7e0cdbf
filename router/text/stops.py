"""Stop strings over a text that arrives in pieces.

The match is the one that is *complete* first; among those complete at the same character, the longest. That rule does
not depend on how the text is cut, and it is what a reader of one character at a time would do.
"""

from __future__ import annotations

from collections.abc import Sequence


def _failure(pattern: str) -> list[int]:
    """Knuth-Morris-Pratt: entry i is the length of the longest proper border of pattern[: i + 1]."""
    table = [0] * len(pattern)
    k = 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = table[k - 1]
        if pattern[i] == pattern[k]:
            k += 1
        table[i] = k
    return table


class StopFinder:
    """Looks for stop strings in one stream of text; O(characters x stops), whatever the pieces are.

    Text that may still turn out to be the beginning of a stop string is held back. `included`: the one that is found is
    part of the text.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        self._included = included
        self._patterns = [(s, _failure(s)) for s in dict.fromkeys(stops) if s]
        self._states = [0] * len(self._patterns)
        self._first = {s[0] for s, _ in self._patterns}
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is now known to stand before any stop string, or to end with it. Empty once `matched` is set."""
        if self.matched is not None:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text
        states = self._states
        whole = self._held + text
        for at, char in enumerate(text):
            found = 0
            for p, (pattern, failure) in enumerate(self._patterns):
                k = states[p]
                while k and pattern[k] != char:
                    k = failure[k - 1]
                if pattern[k] == char:
                    k += 1
                states[p] = k
                if k == len(pattern):
                    found = max(found, k)
                    if found == k:
                        self.matched = pattern
            if found:
                end = len(self._held) + at + 1
                self._held = ""
                return whole[: end if self._included else end - found]
        held = max(states)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes. Empty after a match."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._patterns)
        return held
