"""Answers of a model in this process: one rank and its engine, no Ray and no HTTP."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cluster.chat.terminal import Message
from cluster.config import ClusterConfig, ModelSection, resolve_model
from cluster.served_model import served_model
from router.http.config import FrontConfig
from router.http.identity import Identity
from router.http.job import JobMaker
from router.protocol.openai import ChatBody
from router.protocol.validation import validate
from router.text.offload import TextPool
from workers.api.request import EngineRequest


class LocalAnswers:
    """Of the checkpoint `model` (as `echelon serve` takes it). Raises ConfigError, WeightError or OutOfMemory."""

    def __init__(self, model: str, temperature: float | None) -> None:
        from workers.rank import Rank  # torch

        folder = resolve_model(model)
        config = ClusterConfig(model=ModelSection(path=str(folder)))
        rank = Rank(config.replica_config("auto"))
        self._engine = rank.make_engine()
        self._model = replace(served_model(config, folder), max_model_len=self._engine.max_model_len)
        self._maker = JobMaker(FrontConfig(), TextPool(1), lambda: secrets.randbits(64), time.time)
        self._loop = asyncio.Runner()  # one for all messages: the chat template's process belongs to it
        self._temperature = temperature
        self.name = f"{model} in this process on {rank.device}"

    def stream(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """See `cluster.chat.terminal.Answers`; on the main thread. Ctrl-C ends it after the step under way."""
        body = validate(
            ChatBody, {"model": self._model.name, "messages": list(messages), "temperature": self._temperature}
        )
        job = self._loop.run(self._maker.chat(body, self._model, Identity()))
        request, choice, engine = job.requests[0], job.choices[0], self._engine
        with _interrupts_noted() as interrupted:
            engine.submit(EngineRequest(request.id, request.prompt_ids, request.samplings[0]))
            try:
                while not choice.is_over():
                    for delta in engine.step():
                        if text := choice.push(delta):
                            yield text
                    if interrupted():
                        raise KeyboardInterrupt
            finally:
                engine.abort(request.id)
                while engine.has_work:
                    engine.step()


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside: it must not tear a step."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
