"""What decides whether a stream under load was exact must itself be right."""

from __future__ import annotations

from exact_streams import Ask, Expected, wrong_with


def test_the_check_of_a_stream_can_fail() -> None:
    ask = Ask("/completions", {"prompt": "x"})
    expected = Expected(("ab",), ("length",), {"completion_tokens": 2})
    event = '{"id":"1","choices":[{"index":0,"text":"%s","logprobs":null,"finish_reason":%s}],"usage":null}'
    usage = '{"id":"1","choices":[],"usage":{"completion_tokens":2}}'

    def body(*events: str) -> bytes:
        return "".join(f"data: {e}\n\n" for e in events).encode()

    good = [event % ("a", "null"), event % ("b", "null"), event % ("", '"length"'), usage, "[DONE]"]
    assert wrong_with(body(*good), ask, expected) == ""
    twice = [*good[:2], *good[1:]]
    for events in (twice, good[1:], good[:-1], [*good[:2], *good[3:]], [*good[:3], good[4]], [*good, good[4]]):
        assert wrong_with(body(*events), ask, expected), events
