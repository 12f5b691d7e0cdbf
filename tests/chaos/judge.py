"""The verdict on one answer, from the bytes that its client got. Pure.

An answer is exact when its text is the oracle's byte by byte, every choice ends once, the bill counts each token once,
and nothing comes after the end. Whatever else happened to it has a name here: a stream that ends cleanly though it
failed would pass as LESS, never as EXACT.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

from chaos.oracle import Ask


class Fate(enum.StrEnum):
    """How a request ended for its client."""

    EXACT = "exact"
    REFUSED = "refused"  # 429 or 503 with Retry-After, before it was accepted
    UNANSWERED = "unanswered"  # never accepted, and nothing honest was said
    DECLARED = "declared"  # accepted, and ended by an error event
    TORN = "torn"  # accepted, and cut off
    HUNG = "hung"  # accepted, and silent for longer than anybody waits
    REPEATED = "repeated"  # tokens came twice
    LESS = "less"  # tokens are missing
    OTHER = "other"  # another text, bill or end

    @property
    def is_lost(self) -> bool:
        """Whether an accepted request came to no end of its own."""
        return self in (Fate.DECLARED, Fate.TORN, Fate.HUNG)

    @property
    def is_inexact(self) -> bool:
        """Whether it ended as if it were well, and is not."""
        return self in (Fate.REPEATED, Fate.LESS, Fate.OTHER)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A fate, and of all but exact ones what was seen."""

    fate: Fate
    seen: str = ""


EXACT = Verdict(Fate.EXACT)


def judge(raw: bytes, ask: Ask) -> Verdict:
    """The verdict on a connection that has ended; `raw` is all that it brought, from the status line on."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    status = head[9:12]
    if not head.startswith(b"HTTP/1.1 "):
        return Verdict(Fate.UNANSWERED, repr(raw[:80]))
    if status in (b"429", b"503") and b"retry-after:" in head.lower():
        return Verdict(Fate.REFUSED, _short(rest))
    if status != b"200":
        return Verdict(Fate.UNANSWERED, _short(raw))
    body, whole = unchunked(rest) if b"transfer-encoding: chunked" in head.lower() else (rest, True)
    if ask.stream:
        return _streamed(body, whole, ask)
    length = _content_length(head)
    if not whole or (length is not None and len(body) < length):
        return Verdict(Fate.TORN, _short(body))
    return _whole(json.loads(body), ask)


def unchunked(rest: bytes) -> tuple[bytes, bool]:
    """The body of a chunked answer as far as it came, and whether it came to its end."""
    parts: list[bytes] = []
    while True:
        size, line_end, rest = rest.partition(b"\r\n")
        if not line_end:
            return b"".join(parts), False
        length = int(size, 16)
        parts.append(rest[:length])
        if not length:
            return b"".join(parts), True
        if len(rest) < length + 2:
            return b"".join(parts), False
        rest = rest[length + 2 :]


def compare(text: str, expected: str) -> Verdict:
    """EXACT, or what sets `text` apart: REPEATED where a piece of it comes again, LESS where one is left out."""
    if text == expected:
        return EXACT
    at = next(
        (i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    where = f"at {at} of {len(expected)}: {text[at : at + 40]!r} instead of {expected[at : at + 40]!r}"
    if at == len(text):
        return Verdict(Fate.LESS, where)
    goes_on = text[at : at + 24]
    if at == len(expected) or (len(text) > len(expected) and goes_on in expected[: at + len(goes_on) - 1]):
        return Verdict(Fate.REPEATED, where)
    if len(text) < len(expected) and goes_on in expected[at:]:
        return Verdict(Fate.LESS, where)
    return Verdict(Fate.OTHER, where)


def _streamed(body: bytes, whole: bool, ask: Ask) -> Verdict:
    blocks = body.decode("ascii", "replace").split("\n\n")
    tail, lines = blocks.pop(), [b.removeprefix("data: ") for b in blocks]
    if any(line.startswith('{"error"') for line in lines):
        return Verdict(Fate.DECLARED, lines[-1][:200])
    if not whole or tail or not lines or lines[-1] != "[DONE]":
        return Verdict(Fate.TORN, f"ends with {body[-120:]!r}")
    events = [json.loads(line) for line in lines[:-1]]
    texts, ends = [""] * ask.choices, [0] * ask.choices
    shown = [b""] * ask.choices
    bills = [e["usage"] for e in events if e.get("usage")]
    for event in events:
        for choice in event["choices"]:
            at = choice["index"]
            if ends[at] and (choice["delta"].get("content") or choice["finish_reason"]):
                return Verdict(Fate.REPEATED, f"choice {at} goes on after its end")
            texts[at] += choice["delta"].get("content") or ""
            ends[at] += choice["finish_reason"] is not None
            shown[at] += _token_bytes(choice.get("logprobs"))
            if choice["finish_reason"] not in (None, "length"):
                return Verdict(Fate.OTHER, f"choice {at} ends with {choice['finish_reason']}")
    for text, seen in zip(texts, shown, strict=True):
        verdict = compare(text, ask.expected)
        if verdict == EXACT and ask.logprobs:
            verdict = compare(seen.decode("utf-8", "replace"), ask.expected)
        if verdict != EXACT:
            return verdict
    if ends != [1] * ask.choices:
        return Verdict(Fate.OTHER, f"finish reasons by choice: {ends}")
    return _bill(bills, ask)


def _whole(answer: dict[str, Any], ask: Ask) -> Verdict:
    choices = answer["choices"]
    if [c["finish_reason"] for c in choices] != ["length"] * ask.choices:
        return Verdict(Fate.OTHER, f"finish reasons {[c['finish_reason'] for c in choices]}")
    for choice in choices:
        verdict = compare(choice["message"]["content"], ask.expected)
        if verdict != EXACT:
            return verdict
    return _bill([answer["usage"]], ask)


def _bill(bills: list[dict[str, Any]], ask: Ask) -> Verdict:
    counted = [(b["prompt_tokens"], b["completion_tokens"]) for b in bills]
    return EXACT if counted == [ask.usage] else Verdict(Fate.OTHER, f"billed {counted} instead of {ask.usage}")


def _token_bytes(logprobs: dict[str, Any] | None) -> bytes:
    return b"".join(bytes(t["bytes"]) for t in (logprobs or {}).get("content") or ())


def _content_length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return None


def _short(raw: bytes) -> str:
    return raw[:200].decode("latin-1")
