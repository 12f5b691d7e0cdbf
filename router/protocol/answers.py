"""Bodies and stream events of both endpoints. Events are spliced from prepared strings: no model, no dict a token."""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from router.parsers.pieces import Arguments, CallBegins, Content, ParsedMessage, Piece, Reasoning
from router.protocol.sse import CONTENT_TYPE, DONE, dumps, error_event, quoted
from workers.api.request import TokenLogprobs

TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one HTTP request, for the bill."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0  # of the completion's

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose log-probabilities are shown, and where its text starts in the answer (characters)."""

    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True, slots=True)
class ChoiceAnswer:
    """A finished choice."""

    index: int
    text: str
    finish: str
    tokens: Sequence[ShownToken] | None
    prompt: Sequence[TokenLogprobs] = ()  # of the prompt's tokens from the second on, where they were asked for
    message: ParsedMessage | None = None  # its parts, where it was parsed
    token_ids: tuple[int, ...] = ()  # all that it emitted


@dataclass(frozen=True, slots=True)
class PromptShown:
    """What is shown of the prompts' log-probabilities: how many alternatives as vLLM writes them, and how many before
    the answer's own, for an echo; None: not there. `ids_of[i]` is the prompt of choice i.
    """

    ids_of: Sequence[tuple[int, ...]]
    own: int | None
    echoed: int | None


class Format(Protocol):
    """How an endpoint writes its answers."""

    @property
    def content_type(self) -> bytes:
        """Of a stream."""

    @property
    def done(self) -> str:
        """What ends a whole stream."""

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""

    def opening(self, index: int) -> str:
        """The first event of a choice; may be empty."""

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """An event with new text."""

    def finish(self, index: int, reason: str) -> str:
        """The last event of a choice."""

    def usage(self, usage: Usage) -> str:
        """The usage event of a stream that asked for it."""

    def error(self, body: bytes) -> str:
        """The last event of a stream that failed; `done` does not follow it."""


@runtime_checkable
class PartsFormat(Format, Protocol):
    """How an endpoint whose answers are parsed writes them."""

    def parts(self, index: int, pieces: Sequence[Piece], tokens: Sequence[ShownToken] | None) -> str:
        """Events with new pieces of a choice, in the place of `text`."""


def prompt_scores(scores: Sequence[TokenLogprobs], top: int, token_bytes: TokenBytes) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: an object for each of the prompt's tokens, none for the first."""

    def by_id(p: TokenLogprobs) -> dict[str, Any]:
        every = {i: (logprob, rank) for rank, (i, logprob) in enumerate(p.top[:top], 1)}
        every = {p.token_id: (p.logprob, p.rank), **every}
        return {
            str(i): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": token_bytes(i).decode("utf-8", "replace"),
            }
            for i, (logprob, rank) in every.items()
        }

    return [None, *map(by_id, scores)]


class _Events:
    """Streams are server-sent events."""

    content_type = CONTENT_TYPE
    done = DONE

    def error(self, body: bytes) -> str:
        """The error as an event."""
        return error_event(body)


class _Envelope:
    def __init__(self, kind: str, id: str, created: int, model: str, usage_in_chunks: bool) -> None:
        self._fields: dict[str, Any] = {"id": id, "object": kind, "created": created, "model": model}
        self._fields["system_fingerprint"] = None
        head = dumps(self._fields)[:-1]
        self._head = f'data: {head},"choices":[{{"index":'
        self._bare = f'data: {head},"choices":[],"usage":'
        self._tail = '}],"usage":null}\n\n' if usage_in_chunks else "}]}\n\n"

    def usage(self, usage: Usage) -> str:
        return f"{self._bare}{dumps(usage.as_json())}}}\n\n"

    def in_choice(self, event: str, name: str, ids: Sequence[int]) -> str:
        """`event`, with ids in its choice."""
        return f'{event[: -len(self._tail)]},"{name}":{dumps(ids)}{self._tail}'

    def beside_choices(self, event: str, name: str, ids: Sequence[int]) -> str:
        """`event`, with ids of its own."""
        return f'{event[: -len(self._tail)]}}}],"{name}":{dumps(ids)}{self._tail[2:]}'


class _Heads(dict[int, str]):
    """What stands before the new text of choice i; made once a choice."""

    def __init__(self, head: str, field: str) -> None:
        super().__init__()
        self._head, self._field = head, field

    def __missing__(self, index: int) -> str:
        head = self[index] = f"{self._head}{index},{self._field}"
        return head


class ChatFormat(_Events):
    """/v1/chat/completions. `names`: what tokens are called beside their log-probabilities; None: as they read."""

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        token_bytes: TokenBytes,
        *,
        names: TokenBytes | None = None,
        usage_in_chunks: bool = False,
    ) -> None:
        self._envelope = _Envelope("chat.completion.chunk", id, created, model, usage_in_chunks)
        self._token_bytes, self._names = token_bytes, names or token_bytes
        self.prompt_ids: tuple[int, ...] | None = None  # shown with those of the answers; None: they are not
        self.prompt_top: int | None = None  # alternatives shown of each of the prompt's tokens; None: none are shown
        self._head, self._tail = self._envelope._head, self._envelope._tail
        self._plain_tail = '},"logprobs":null,"finish_reason":null' + self._tail
        self._text_heads = _Heads(self._head, '"delta":{"content":')

    def opening(self, index: int) -> str:
        """The role."""
        return f'{self._head}{index},"delta":{{"role":"assistant","content":"","refusal":null{self._plain_tail}'

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """Content."""
        head = self._text_heads[index] + quoted(text)
        if tokens is None:
            return head + self._plain_tail
        return f'{head}}},"logprobs":{dumps(self._logprobs(tokens))},"finish_reason":null{self._tail}'

    def prompt(self, index: int, scores: Sequence[TokenLogprobs]) -> str:
        """An empty delta with the prompt's log-probabilities."""
        shown = dumps(prompt_scores(scores, self.prompt_top or 0, self._token_bytes))
        fields = f'"delta":{{}},"logprobs":null,"finish_reason":null,"prompt_logprobs":{shown}'
        return f"{self._head}{index},{fields}{self._tail}"

    def with_ids(self, event: str, ids: Sequence[int]) -> str:
        """`event`, with ids of the answer."""
        return self._envelope.in_choice(event, "token_ids", ids)

    def with_prompt_ids(self, index: int, event: str) -> str:
        """The first event of a choice, with the prompt's ids if it is the first of all."""
        return event if index else self._envelope.beside_choices(event, "prompt_token_ids", self.prompt_ids or ())

    def parts(self, index: int, pieces: Sequence[Piece], tokens: Sequence[ShownToken] | None) -> str:
        """Content, reasoning, tool calls and their arguments as they grow."""
        events = ""
        for piece in pieces:
            if isinstance(piece, Content):
                events += self.text(index, piece.text, tokens)
                tokens = None if tokens is None else ()
            else:
                events += f'{self._head}{index},"delta":{dumps(_delta(piece))[:-1]}{self._plain_tail}'
        return events + self.text(index, "", tokens) if tokens else events

    def finish(self, index: int, reason: str) -> str:
        """An empty delta with the reason."""
        return f'{self._head}{index},"delta":{{}},"logprobs":null,"finish_reason":"{reason}"{self._tail}'

    def usage(self, usage: Usage) -> str:
        """No choices, the usage."""
        return self._envelope.usage(usage)

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        shown = [
            {
                "index": c.index,
                "message": _message(c),
                "logprobs": None if c.tokens is None else self._logprobs(c.tokens),
                "finish_reason": c.finish,
                **({} if self.prompt_ids is None else {"token_ids": c.token_ids}),
            }
            for c in choices
        ]
        fields = {**self._envelope._fields, "object": "chat.completion", "choices": shown, "usage": usage.as_json()}
        if self.prompt_ids is not None:
            fields["prompt_token_ids"] = self.prompt_ids
        if self.prompt_top is not None:
            fields["prompt_logprobs"] = prompt_scores(choices[0].prompt, self.prompt_top, self._token_bytes)
        return dumps(fields).encode("ascii")

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._one(t.logprobs.token_id, t.logprobs.logprob),
                    "top_logprobs": [self._one(i, p) for i, p in t.logprobs.top],
                }
                for t in tokens
            ],
            "refusal": None,
        }

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._names(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def _delta(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, CallBegins):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}
    if isinstance(piece, Arguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return {"reasoning_content": piece.text} if isinstance(piece, Reasoning) else {"content": piece.text}


def _message(choice: ChoiceAnswer) -> dict[str, Any]:
    parsed = choice.message
    if parsed is None:
        return {"role": "assistant", "content": choice.text, "refusal": None}
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content, "refusal": None}
    if thoughts := parsed.reasoning:
        message["reasoning_content"] = thoughts
    if calls := parsed.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


class CompletionFormat(_Events):
    """/v1/completions. `echoes[i]` stands before the text of choice i (empty where no echo is wanted); `names` as for
    chats.
    """

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        token_bytes: TokenBytes,
        *,
        echoes: Sequence[str],
        names: TokenBytes | None = None,
        usage_in_chunks: bool = False,
    ) -> None:
        self._envelope = _Envelope("text_completion", id, created, model, usage_in_chunks)
        self._token_bytes, self._names = token_bytes, names or token_bytes
        self.prompt_ids: Sequence[tuple[int, ...]] | None = (
            None  # of each choice, shown with its own; None: they are not
        )
        self._echoes = echoes
        self.prompt_shown: PromptShown | None = None
        self._head, self._tail = self._envelope._head, self._envelope._tail
        self._plain_tail = ',"logprobs":null,"finish_reason":null' + self._tail
        self._text_heads = _Heads(self._head, '"text":')

    def opening(self, index: int) -> str:
        """The echoed prompt, unless it waits for its log-probabilities."""
        echo = "" if self.prompt_shown is not None else self._echoes[index]
        return self.text(index, echo, None) if echo or self.prompt_ids is not None else ""

    def with_ids(self, event: str, ids: Sequence[int]) -> str:
        """`event`, with ids of the answer."""
        return self._envelope.in_choice(event, "token_ids", ids)

    def with_prompt_ids(self, index: int, event: str) -> str:
        """The first event of a choice, with its prompt's ids."""
        assert self.prompt_ids is not None, "nobody asked for the prompt's ids"
        return self._envelope.in_choice(event, "prompt_token_ids", self.prompt_ids[index])

    def prompt(self, index: int, scores: Sequence[TokenLogprobs]) -> str:
        """The echo, and the log-probabilities of the prompt."""
        shown: dict[str, Any] = {"text": self._echoes[index], "logprobs": None}
        if self.prompt_shown is not None and self.prompt_shown.echoed is not None:
            shown["logprobs"] = self._logprobs(())
        self._show_prompt(shown, index, scores)
        fields = f'"text":{quoted(shown.pop("text"))},"finish_reason":null,{dumps(shown)[1:-1]}'
        return f"{self._head}{index},{fields}{self._tail}"

    def text(self, index: int, text: str, tokens: Sequence[ShownToken] | None) -> str:
        """New text."""
        head = self._text_heads[index] + quoted(text)
        if tokens is None:
            return head + self._plain_tail
        return f'{head},"logprobs":{dumps(self._logprobs(tokens))},"finish_reason":null{self._tail}'

    def finish(self, index: int, reason: str) -> str:
        """No text, the reason."""
        return f'{self._head}{index},"text":"","logprobs":null,"finish_reason":"{reason}"{self._tail}'

    def usage(self, usage: Usage) -> str:
        """No choices, the usage."""
        return self._envelope.usage(usage)

    def body(self, choices: Sequence[ChoiceAnswer], usage: Usage) -> bytes:
        """The whole answer."""
        shown: list[dict[str, Any]] = [
            {
                "index": c.index,
                "text": self._echoes[c.index] + c.text,
                "logprobs": None if c.tokens is None else self._logprobs(c.tokens),
                "finish_reason": c.finish,
            }
            for c in choices
        ]
        if self.prompt_shown is not None:
            for one, choice in zip(shown, choices, strict=True):
                self._show_prompt(one, choice.index, choice.prompt)
        if self.prompt_ids is not None:
            for one, choice in zip(shown, choices, strict=True):
                one.update(prompt_token_ids=self.prompt_ids[choice.index], token_ids=choice.token_ids)
        return dumps({**self._envelope._fields, "choices": shown, "usage": usage.as_json()}).encode("ascii")

    def _show_prompt(self, shown: dict[str, Any], index: int, scores: Sequence[TokenLogprobs]) -> None:
        """vLLM's `prompt_logprobs`, and for an echo the prompt's tokens before the answer's. The first has none."""
        what = self.prompt_shown
        assert what is not None, "nobody asked for the prompt's log-probabilities"
        ids = what.ids_of[index]
        if what.own is not None:
            shown["prompt_logprobs"] = prompt_scores(scores, what.own, self._token_bytes)
        if what.echoed is None or shown["logprobs"] is None:
            return
        decoder, offsets, at = getincrementaldecoder("utf-8")("replace"), [], 0
        for token in ids:
            offsets.append(at)
            at += len(decoder.decode(self._token_bytes(token)))
        first = {"tokens": [self._text(ids[0])], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
        rest = [replace(p, top=p.top[: what.echoed]) for p in scores]
        more = self._logprobs([ShownToken(p, at) for p, at in zip(rest, offsets[1:], strict=True)])
        shown["logprobs"] = {key: first[key] + more[key] + own for key, own in shown["logprobs"].items()}

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return {
            "tokens": [self._text(t.logprobs.token_id) for t in tokens],
            "token_logprobs": [finite(t.logprobs.logprob) for t in tokens],
            "top_logprobs": [{self._text(i): finite(p) for i, p in t.logprobs.top} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _text(self, token_id: int) -> str:
        return self._names(token_id).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold: OpenAI's -9999.0 stands for minus infinity."""
    return logprob if math.isfinite(logprob) else -9999.0
