"""A round of an interactive session: what came before it, the choice that remembers, and the end that is kept.

The history is kept as messages, and as the ids that were its prompt and answer. A round's prompt is the template's
rendering of all messages, so that the answer is the one that the same messages would get on any other route; whether
it goes on from the ids that were, as it does unless template or tokenizer say them otherwise, shows in how many of its
first ids are the history's.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol, Self

import msgpack

from router.generation import ChoiceDelta, GenerationRequest, Generator, Sink
from router.http.choice import Choice
from router.protocol.openai import ChatMessage
from router.text.detokenizer import Detokenizer
from workers.api.request import Delta, FinishReason

STOPPED = "abort"  # the finish reason of a round that was cancelled


class Histories(Protocol):
    """Where sessions are kept, for all fronts."""

    async def begin(self, owner: str, session: int, on_stop: Callable[[], None]) -> bytes:
        """The session's history (empty: it is new); this caller owes an `end`. `on_stop` is called if it is cancelled.

        Raises HttpRefusal (409: another round runs), Overloaded or NoReplica.
        """

    def end(self, owner: str, session: int, history: bytes) -> None:
        """The round is over; an empty history leaves the old one."""

    async def forget(self, owner: str, session: int) -> None:
        """There is no such session any more. Raises as `begin`."""

    async def cancel(self, owner: str, session: int) -> None:
        """The round that runs, if any, is over. Raises NoReplica."""


@dataclass(frozen=True, slots=True)
class History:
    """What was said, and the ids of it all as the model had them."""

    model: str = ""
    messages: tuple[tuple[str, str, str | None], ...] = ()  # role, content, name
    ids: tuple[int, ...] = ()

    def encoded(self) -> bytes:
        """As it is kept."""
        packed: bytes = msgpack.packb([self.model, self.messages, array("I", self.ids).tobytes()])
        return packed

    @classmethod
    def decoded(cls, kept: bytes) -> Self:
        """The inverse; of nothing, an empty one."""
        if not kept:
            return cls()
        model, messages, ids = msgpack.unpackb(kept, use_list=False)
        return cls(model, messages, tuple(array("I", ids)))

    def before(self, prompt: list[ChatMessage]) -> list[ChatMessage]:
        """All messages, those of `prompt` last."""
        return [ChatMessage.model_construct(role=r, content=c, name=n) for r, c, n in self.messages] + prompt

    def shared(self, model: str, ids: Sequence[int]) -> int:
        """How many of the first of `ids` are the history's, for the same model."""
        if model != self.model:
            return 0
        if ids[: len(self.ids)] == self.ids:
            return len(self.ids)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, self.ids, strict=False)))


class Round:
    """One round that runs here. It ends once: with an answer, which is kept, or as if it had not been."""

    def __init__(self, histories: Histories, owner: str, session: int) -> None:
        self._histories, self._owner, self._session = histories, owner, session
        self._stop = asyncio.Event()
        self._asked = History()
        self.over = False
        self.history = History()

    @classmethod
    async def begin(cls, histories: Histories, owner: str, session: int) -> Self:
        """The next round of the session. Raises what `Histories.begin` raises."""
        self = cls(histories, owner, session)
        self.history = History.decoded(await histories.begin(owner, session, self._stop.set))
        return self

    @property
    def stopped(self) -> bool:
        """Whether it was cancelled."""
        return self._stop.is_set()

    def asks(self, model: str, messages: Sequence[ChatMessage], prompt_ids: tuple[int, ...]) -> None:
        """The prompt is all of `messages`, history included, and these ids."""
        self._asked = History(model, tuple((m.role, m.content, m.name) for m in messages), prompt_ids)

    def answered(self, text: str, ids: Sequence[int]) -> None:
        """The round is over and this is its answer."""
        if not self.over:
            self.over = True
            asked = self._asked
            kept = History(asked.model, (*asked.messages, ("assistant", text, None)), (*asked.ids, *ids))
            self._histories.end(self._owner, self._session, kept.encoded())

    def drop(self) -> None:
        """The round is over without an answer, unless it was over: the history is what it was before."""
        if not self.over:
            self.over = True
            self._histories.end(self._owner, self._session, b"")

    async def until_stopped(self) -> None:
        """Return when it is cancelled."""
        await self._stop.wait()


class RoundChoice(Choice):
    """A choice that ends its round as it ends, before its client can know of it."""

    def __init__(self, round_: Round, index: int, detokenizer: Detokenizer, **how: Any) -> None:
        super().__init__(index, detokenizer, **how)
        self._round = round_
        self._ids: list[int] = []
        self._texts: list[str] = []

    def push(self, delta: Delta) -> str:
        """See `Choice`. A round that was cancelled ends with what it has, and has not been if it has nothing."""
        if self.is_over():
            return ""
        before = self.token_count
        if delta.finish is FinishReason.ABORT and self._round.stopped:
            text = self._stopped()
        else:
            text = super().push(delta)
        self._ids += delta.token_ids[: self.token_count - before]
        self._texts.append(text)
        if self.is_over():
            if self._ids or self.finish != STOPPED:
                self._round.answered("".join(self._texts), self._ids)
            else:
                self._round.drop()
        return text

    def _stopped(self) -> str:
        self._is_plain = False
        text = self._flush()
        self.finish = self.finish or STOPPED
        self.characters += len(text)
        return text


class Stoppable:
    """`generator` for a round, which may be cancelled: it ends then, and says so by its last delta."""

    def __init__(self, generator: Generator, round_: Round, choice: Choice) -> None:
        self._generator, self._round, self._choice = generator, round_, choice

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        """See `Generator`."""
        work = asyncio.ensure_future(self._generator.generate(request, sink))
        stop = asyncio.ensure_future(self._round.until_stopped())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            stopped = not work.done() and work.cancel() and self._round.stopped
            await asyncio.wait({work})
        if not stopped or not work.cancelled():
            await work
        if stopped and not self._choice.is_over():
            last = Delta(request.id, self._choice.token_count, finish=FinishReason.ABORT)
            sink((ChoiceDelta(0, last),))
