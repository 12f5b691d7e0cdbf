"""The judge: what is exact, and the right name for everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chaos.judge import EXACT, Fate, compare, judge
from chaos.oracle import Ask

TEXT = "One and two and three and four."
ASK = Ask("Count.", tokens=9, stream=True, choices=1, logprobs=False, expected=TEXT, prompt_tokens=5)
WHOLE = Ask("Count.", tokens=9, stream=False, choices=1, logprobs=False, expected=TEXT, prompt_tokens=5)
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}


def event(text: str = "", *, finish: str | None = None, index: int = 0, usage: Any = None, error: Any = None) -> bytes:
    if error is not None:
        return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    choices = [] if usage else [{"index": index, "delta": {"content": text}, "finish_reason": finish}]
    return b"data: " + json.dumps({"id": "x", "choices": choices, "usage": usage}).encode() + b"\n\n"


def chunked(*events: bytes, end: bool = True) -> bytes:
    parts = [b"%x\r\n%s\r\n" % (len(e), e) for e in events]
    return HEAD + b"".join(parts) + (b"0\r\n\r\n" if end else b"")


DONE = b"data: [DONE]\n\n"
GOOD = [event(TEXT[:10]), event(TEXT[10:]), event(finish="length"), event(usage=USAGE), DONE]


def test_the_right_text_once_is_exact() -> None:
    assert judge(chunked(*GOOD), ASK) == EXACT


@pytest.mark.parametrize("kept", range(len(GOOD)))
def test_a_stream_that_ends_before_its_end_is_torn_however_cleanly(kept: int) -> None:
    assert judge(chunked(*GOOD[:kept]), ASK).fate is Fate.TORN
    assert judge(chunked(*GOOD[:kept], end=False), ASK).fate is Fate.TORN


def test_every_cut_in_the_bytes_is_found() -> None:
    whole = chunked(*GOOD)
    fates = {judge(whole[:size], ASK).fate for size in range(len(HEAD), len(whole) - 5)}
    assert fates == {Fate.TORN}


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        (TEXT[:14] + TEXT[7:], Fate.REPEATED),
        (TEXT + TEXT[-5:], Fate.REPEATED),
        (TEXT[:8] + TEXT[12:], Fate.LESS),
        (TEXT[:-4], Fate.LESS),
        ("", Fate.LESS),
        (TEXT.replace("two", "six"), Fate.OTHER),
    ],
)
def test_tokens_that_come_twice_or_never_have_a_name(text: str, fate: Fate) -> None:
    assert compare(text, TEXT).fate is fate
    assert judge(chunked(event(text), *GOOD[2:]), ASK).fate is fate


def test_what_was_said_after_the_end_a_wrong_bill_and_a_wrong_end_are_not_exact() -> None:
    assert judge(chunked(*GOOD[:3], event("!"), *GOOD[3:]), ASK).fate is Fate.REPEATED
    assert judge(chunked(*GOOD[:3], event(usage={**USAGE, "completion_tokens": 10}), DONE), ASK).fate is Fate.OTHER
    assert judge(chunked(*GOOD[:3], *GOOD[3:4] * 2, DONE), ASK).fate is Fate.OTHER
    assert judge(chunked(*GOOD[:2], event(finish="stop"), *GOOD[3:]), ASK).fate is Fate.OTHER
    assert judge(chunked(*GOOD[:2], *GOOD[3:]), ASK).fate is Fate.OTHER


def test_a_declared_error_is_no_tear() -> None:
    assert judge(chunked(*GOOD[:1], event(error={"message": "gone"})), ASK).fate is Fate.DECLARED


@pytest.mark.parametrize(
    ("raw", "fate"),
    [
        (b"", Fate.UNANSWERED),
        (b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\n\r\n{}", Fate.REFUSED),
        (b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\n\r\n{}", Fate.REFUSED),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n{}", Fate.UNANSWERED),
        (b"HTTP/1.1 500 Internal Server Error\r\n\r\noops", Fate.UNANSWERED),
    ],
)
def test_only_an_honest_refusal_is_one(raw: bytes, fate: Fate) -> None:
    assert judge(raw, ASK).fate is fate


def test_whole_answers() -> None:
    def answer(text: str, *, short: int = 0) -> bytes:
        choice = {"message": {"content": text}, "finish_reason": "length"}
        body = json.dumps({"choices": [choice], "usage": USAGE}).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body[: len(body) - short])

    assert judge(answer(TEXT), WHOLE) == EXACT
    assert judge(answer(TEXT + TEXT), WHOLE).fate is Fate.REPEATED
    assert judge(answer(TEXT, short=1), WHOLE).fate is Fate.TORN
