"""Chat templates that requests bring along: each in a process with limits, as a checkpoint's; the last few are kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from router.text.chat import ChatEncoder
from router.text.offload import TextPool
from router.text.template_pool import TemplatePool
from router.text.template_process import RenderLimits
from router.text.templates import FAILED, Conversation
from router.text.tokenizer import Tokenizer
from workers.api.errors import InvalidRequest, Overloaded

MOST = 4  # templates with a process
LIMITS = RenderLimits(processes=1, start_seconds=20.0, waiting=64)


@dataclass(slots=True)
class _Kept:
    pool: TemplatePool
    encoder: ChatEncoder
    users: int = 0  # requests that are at it


class RequestTemplates:
    """At most `most` at a time; the one that was not used for longest makes room for a new one."""

    def __init__(self, most: int = MOST, limits: RenderLimits = LIMITS) -> None:
        self._most, self._limits = most, limits
        self._kept: OrderedDict[tuple[str, bytes], _Kept] = OrderedDict()

    async def encode(
        self, model: str, tokenizer: Tokenizer, source: str, conversation: Conversation, pool: TextPool, *, limit: int
    ) -> list[int]:
        """Ids of the conversation's prompt by the template `source`: see `ChatEncoder.encode`.

        Raises InvalidRequest with the param `chat_template` where that is no template, or fails; Overloaded where too
        many others are in use.
        """
        key = (model, hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest())
        kept = self._kept.get(key) or self._add(key, tokenizer, source)
        self._kept.move_to_end(key)
        kept.users += 1
        try:
            return await kept.encoder.encode(conversation, pool, limit=limit)
        except InvalidRequest as e:
            if e.code == FAILED:
                e.param = "chat_template"
            raise
        finally:
            kept.users -= 1

    def close(self) -> None:
        """All processes have ended."""
        while self._kept:
            self._kept.popitem()[1].pool.close()

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [pid for kept in self._kept.values() for pid in kept.pool.pids]

    def _add(self, key: tuple[str, bytes], tokenizer: Tokenizer, source: str) -> _Kept:
        if len(self._kept) >= self._most:
            idle = next((k for k, kept in self._kept.items() if not kept.users), None)
            if idle is None:
                raise Overloaded("Too many other chat templates of requests are in use.")
            self._kept.pop(idle).pool.close()
        renderer = TemplatePool(source, tokenizer.named_tokens, limits=self._limits, logs=False)
        kept = self._kept[key] = _Kept(renderer, tokenizer.chat_by(renderer, source))
        return kept
