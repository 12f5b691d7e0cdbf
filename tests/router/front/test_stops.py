"""Stop strings: the answer does not depend on how the text is cut."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.text.stops import StopFinder

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def unsplit(text, stops):
    """The definition, by trying every prefix."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 4)))
@settings(max_examples=800, deadline=None)
@example(text="aabaabaac", stops=["aabaac"], cuts=[1] * 9)
@example(text="abcd", stops=["abcd", "bc"], cuts=[3])
def test_any_split_gives_the_unsplit_answer(text, stops, cuts):
    finder = StopFinder(stops)
    pieces, at = [], 0
    for size in [*cuts, len(text)]:
        pieces.append(finder.push(text[at : at + size]))
        at += size
        before, matched = unsplit(text[:at], stops)
        shown = "".join(pieces)
        if matched is None:
            # What is held back is the beginning of a stop string, and no more than needed.
            held = text[:at][len(shown) :]
            assert before == shown + held
            assert not held or any(s.startswith(held) for s in stops)
    before, matched = unsplit(text, stops)
    assert finder.matched == matched
    assert "".join(pieces) + finder.flush() == before


def test_after_a_match_nothing_comes():
    finder = StopFinder(["xy"])
    assert finder.push("ax") == "a"
    assert finder.push("yb") == ""
    assert finder.matched == "xy"
    assert finder.push("more") == ""
    assert finder.flush() == ""
