"""Prompts to jobs: the same checks, templates and limits as over HTTP."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.pipeline.generation_config import GenerationConfig
from cluster.pipeline.prompts import Prompt
from router.generation import GenerationRequest
from router.http.choice import Choice
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.http.job import JobMaker
from router.protocol.openai import ChatBody, CompletionBody
from router.protocol.validation import validate
from router.text.offload import TextPool

T = TypeVar("T")


@dataclass(slots=True)
class Question:
    """One prompt: what the engine is asked, and who reads its n answers. `place` counts the prompts of one call."""

    place: int
    request: GenerationRequest
    choices: list[Choice]
    config: GenerationConfig

    @property
    def input_tokens(self) -> int:
        """Of the prompt."""
        return len(self.request.prompt_ids)


class Questions:
    """Makes questions for `model`. Any thread may ask."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self._pool = TextPool(1)
        self._maker = JobMaker(FrontConfig(), self._pool, lambda: secrets.randbits(64), time.time)
        self._loop = TextLoop()

    def question(self, place: int, prompt: Prompt, config: GenerationConfig, *, preprocess: bool) -> Question:
        """The question of `prompt`; a text is a user's message where the model has a chat template and `preprocess`.

        Raises InvalidRequest, or ContextLengthExceeded where no token of an answer would fit.
        """
        name = self.model.name
        body = config.body() | {"model": name}
        if isinstance(prompt, str) and not (preprocess and self.model.tokenizer.chat is not None):
            room = self.model.max_model_len
            text = validate(CompletionBody, body | {"prompt": prompt})
            stops = (*text.stop, *(config.stop_words or ()))
            ids = self._loop.run(self._pool.run(len(prompt), lambda: self.model.tokenizer.encode(prompt, limit=room)))
            most = max(1, min(config.max_new_tokens, room - len(ids)))
            text = text.model_copy(update={"stop": stops, "max_tokens": most})
            job = self._loop.run(self._maker.completion(text, self.model, Identity()))
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = validate(ChatBody, body | {"messages": messages})
            chat = chat.model_copy(update={"stop": (*chat.stop, *(config.stop_words or ()))})
            job = self._loop.run(self._maker.chat(chat, self.model, Identity()))
        request = job.requests[0]
        fitted = tuple(config.fitted(sampling) for sampling in request.samplings)
        return Question(place, replace(request, samplings=fitted), job.choices, config)

    def close(self) -> None:
        """Threads and processes for text have ended."""
        if self.model.tokenizer.chat is not None:
            self._loop.call(self.model.tokenizer.chat.close)
        self._loop.close()
        self._pool.close()


class TextLoop:
    """An event loop in a thread: chat templates are rendered in one, whoever asks, and whatever loop runs there."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="echelon-prompts", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; raises what it raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def call(self, work: Any) -> None:
        """`work()` has run in the loop."""

        async def do() -> None:
            work()

        self.run(do())

    def close(self) -> None:
        """The thread has ended."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
