"""Conversations to token ids: special strings hidden, the template rendered, the prompt encoded."""

from __future__ import annotations

import tokenizers

from router.text.bounds import TokenBound
from router.text.encoding import check_bound, ids_of
from router.text.literal import LiteralSpecials, said_in, strings
from router.text.offload import TextPool
from router.text.rendering import Renderer
from router.text.templates import Conversation
from workers.api.errors import InvalidRequest


class ChatEncoder:
    """The chats of one checkpoint by one template. `start` and `close` are its renderer's.

    `literal` hides the tokenizer's special strings; `source` is the template where it is jinja, "" where it is no such
    text, None where it is not known.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        renderer: Renderer,
        bound: TokenBound,
        literal: LiteralSpecials,
        source: str | None,
    ) -> None:
        self._backend, self._renderer, self._bound = backend, renderer, bound
        self._literal, self._source = literal, source
        self.start, self.close = renderer.start, renderer.close

    @property
    def is_form(self) -> bool:
        """Whether the template is made of pieces, or a class: it shows messages and nothing else."""
        return self._source == ""

    async def encode(self, conversation: Conversation, pool: TextPool, *, limit: int | None = None) -> list[int]:
        """Ids of the conversation's prompt: the template's special strings are special, those in messages are text.

        Long texts are worked on in `pool`. Raises InvalidRequest where the template refuses the messages, and
        ContextLengthExceeded for a prompt of more than `limit` tokens, if possible before it is tokenized.
        """
        size = sum(map(len, strings(said_in(conversation))))
        hidden, marked = await pool.run(size, lambda: self._literal.hide(conversation))
        try:
            prompt = await self._renderer.render(hidden)
        except InvalidRequest as e:
            if marked:
                raise InvalidRequest(self._literal.show(e.message), param=e.param, code=e.code) from e
            raise
        return await pool.run(len(prompt), lambda: self._encode(prompt, marked, limit))

    def _encode(self, prompt: str, marked: bool, limit: int | None) -> list[int]:
        check_bound(self._bound, prompt, limit=limit, noun="messages")
        if marked:
            return self._literal.encode(prompt, limit=limit, noun="messages")
        return ids_of(self._backend, prompt, add_special_tokens=False, limit=limit, noun="messages")
