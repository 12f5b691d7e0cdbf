"""The whole front over one engine in this process: no Ray and no sockets, but the same bodies, steps and answers."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from router.generation import ChoiceDelta, GenerationRequest, Sink
from router.http.config import ServedModel
from router.text.tokenizer import Tokenizer
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.errors import EngineFault
from workers.api.request import Delta, EngineRequest, FinishReason
from workers.engine.core import Engine
from workers.rank import Rank

DEMO = Path(__file__).parents[1] / "configs" / "demo-model"


class EngineGenerator:
    """A `Generator` over `engine`, which steps in a thread of its own. `resume_after`: a sequence is taken away after
    so many tokens, once, and goes on as a replay.
    """

    def __init__(self, engine: Engine, *, resume_after: int | None = None) -> None:
        self.engine, self.resume_after = engine, resume_after
        self.requests: list[GenerationRequest] = []
        self._calls: deque[Any] = deque()
        self._wake = threading.Event()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Delta]]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        """See `router.generation.Generator`."""
        self.requests.append(request)
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        emitted: list[list[int]] = [[] for _ in request.samplings]
        numbers: dict[str, int] = {}

        def submit(i: int, attempt: int) -> None:
            name = f"{request.id}/{i}#{attempt}"
            numbers[name] = i
            self._waiting[name] = (asyncio.get_running_loop(), queue)
            sequence = EngineRequest(
                name, request.prompt_ids, request.samplings[i], resumed_ids=tuple(emitted[i]), grammar=request.grammar
            )
            self._call(lambda: self.engine.submit(sequence), name)

        wanted = sink(())
        for i in range(len(request.samplings)):
            submit(i, 0)
        left, taken_away = len(request.samplings), set()
        while left and wanted:
            delta = await queue.get()
            i = numbers[delta.request_id]
            if delta.finish is FinishReason.ERROR:
                raise EngineFault(delta.error or "")
            if delta.position < len(emitted[i]) or delta.finish is FinishReason.ABORT:
                continue
            emitted[i] += delta.token_ids
            left -= delta.finish is not None
            wanted = sink((ChoiceDelta(i, delta),))
            if self.resume_after is not None and len(emitted[i]) >= self.resume_after and i not in taken_away:
                taken_away.add(i)
                if delta.finish is None:
                    name = delta.request_id
                    self._call(lambda name=name: self.engine.abort(name), name)
                    submit(i, 1)
        for name in numbers:
            self._call(lambda name=name: self.engine.abort(name), name)

    def close(self) -> None:
        """The engine steps no more."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def _call(self, call: Any, name: str) -> None:
        self._calls.append((call, name))
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            while self._calls:
                call, name = self._calls.popleft()
                try:
                    call()
                except Exception as e:
                    self._tell(Delta(name, 0, finish=FinishReason.ERROR, error=str(e)))
            if self.engine.has_work:
                for delta in self.engine.step():
                    self._tell(delta)
            else:
                self._wake.wait(0.05)
                self._wake.clear()

    def _tell(self, delta: Delta) -> None:
        loop, queue = self._waiting[delta.request_id]
        if delta.finish is not None:
            del self._waiting[delta.request_id]
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, delta)


@contextmanager
def demo_engine(*, threaded: bool = True, folder: Path = DEMO, **engine: Any) -> Iterator[Engine]:
    """An engine of the demo model on this machine; its ledgers are checked at the end."""
    config = EngineConfig(**{"max_num_seqs": 16, "num_blocks": 1024, **engine})
    rank = Rank(ReplicaConfig(ModelConfig(str(folder), "demo"), config), threaded=threaded, threads=1)
    made = rank.make_engine()
    try:
        yield made
        while made.has_work:
            made.step()
        made.check_ledgers()
    finally:
        rank.close()


def demo_model(folder: Path = DEMO, **changes: Any) -> ServedModel:
    """The demo model as the front serves it."""
    tokenizer = Tokenizer.from_folder(folder, trust_template=True)
    return replace(ServedModel("demo", tokenizer, tokenizer.context_length or 2048), **changes)
