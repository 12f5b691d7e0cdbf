"""One rank and its engine in this process: no Ray, no HTTP. Whoever waits for an answer runs the steps."""

from __future__ import annotations

import signal
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from rich.console import Console

from cluster.config import ClusterConfig, resolve_model
from cluster.environment import prepare_torch
from cluster.pipeline.answers import Response
from cluster.pipeline.questions import Question
from cluster.served_model import served_model
from cluster.start_view import RankAt, start_view
from router.perplexity import mean_loss
from workers.api.errors import EngineFault
from workers.api.replica import Stage
from workers.api.request import Delta, EngineRequest, SamplingParams, TokenLogprobs


class LocalEngine:
    """The model of `config` on this machine's first device. Threads may share it; it loads with a progress bar.

    Raises ConfigError, WeightError or OutOfMemory.
    """

    def __init__(self, config: ClusterConfig) -> None:
        prepare_torch()
        from workers.rank import Rank  # torch

        section = config.model
        folder = resolve_model(section.path, section.revision, code=section.trust_remote_code)
        named = section.model_copy(update={"path": str(folder), "name": section.public_name})
        with _loading(section.path) as at:
            rank = Rank(config.model_copy(update={"model": named}).replica_config(section.device), at=at)
        self._engine = rank.make_engine()
        self._rank = rank
        self.model = replace(served_model(config, folder), max_model_len=self._engine.max_model_len)
        self.device = str(rank.device)
        self._lock = threading.RLock()
        self._queues: dict[str, deque[Delta]] = {}

    def pieces(self, questions: Sequence[Question], *, whole: bool) -> Generator[Response, None, None]:
        """The answers, piece by piece; see `Engine`."""
        readers: dict[str, tuple[Question, int]] = {}
        requests = []
        for question in questions:
            asked = question.request
            for c, sampling in enumerate(asked.samplings):
                name = f"{asked.id}/{c}"
                readers[name] = question, c
                requests.append(EngineRequest(name, asked.prompt_ids, sampling, salt=asked.salt))
        left = len(requests)
        with closing(self.run(requests)) as steps:
            for deltas in steps:
                for delta in deltas:
                    question, c = readers[delta.request_id]
                    if not question.choices[c].is_over():
                        piece = _piece(question, c, delta)
                        left -= piece.finish_reason is not None
                        yield piece
                if not left:  # by stop words, which the engine does not know
                    return

    def losses(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """The mean negative log-likelihood of each prompt, nats a token. Raises InvalidRequest, EngineFault."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        requests = [EngineRequest(f"ppl-{uuid.uuid4().hex}-{i}", tuple(ids), sampling) for i, ids in enumerate(prompts)]
        found: dict[str, tuple[TokenLogprobs, ...]] = {request.id: () for request in requests}
        for deltas in self.run(requests):
            for delta in deltas:
                if delta.error is not None:
                    raise EngineFault(delta.error)
                found[delta.request_id] += delta.prompt_logprobs
        return [mean_loss(found[request.id]) for request in requests]

    def run(self, requests: Sequence[EngineRequest]) -> Generator[list[Delta], None, None]:
        """The deltas of `requests`, some of a step at a time, until each has its finish. Closing it aborts the rest.

        Ctrl-C ends it after the step under way.
        """
        queue: deque[Delta] = deque()
        left = {request.id for request in requests}
        try:
            with self._lock:
                for request in requests:
                    self._queues[request.id] = queue
                    self._engine.submit(request)
            while left:
                with self._lock:
                    if not queue:
                        self._step()
                    deltas = list(queue)
                    queue.clear()
                left.difference_update(d.request_id for d in deltas if d.finish is not None)
                yield deltas
        finally:
            self._forget([request.id for request in requests], left)

    def check_ledgers(self) -> None:
        """Raises AssertionError unless every block and every request is accounted for."""
        self._engine.check_ledgers()

    def close(self) -> None:
        """The engine's threads have ended, and its tensors are gone."""
        self._rank.close()
        del self._rank, self._engine

    def _step(self) -> None:
        with _whole_steps():
            for delta in self._engine.step():
                queue = self._queues.get(delta.request_id)
                if queue is not None:  # else it was given up
                    queue.append(delta)

    def _forget(self, ids: Sequence[str], unfinished: set[str]) -> None:
        with self._lock:
            for name in ids:
                self._queues.pop(name, None)
            for name in unfinished:
                self._engine.abort(name)
            while unfinished and self._engine.has_work and not self._queues:
                self._step()


def _piece(question: Question, c: int, delta: Delta) -> Response:
    """What `delta` adds to choice `c`. Raises EngineFault."""
    choice = question.choices[c]
    before = choice.token_count
    text = choice.push(delta)
    new = choice.token_count - before
    logprobs = None
    if question.config.logprobs is not None:
        logprobs = [{t.token_id: t.logprob, **dict(t.top)} for t in delta.logprobs[:new]]
    return Response(
        text=text,
        generate_token_len=choice.token_count,
        input_token_len=question.input_tokens,
        finish_reason=choice.finish,
        token_ids=list(delta.token_ids[:new]),
        logprobs=logprobs,
        index=question.place * len(question.choices) + c,
    )


@contextmanager
def _whole_steps() -> Iterator[None]:
    """Ctrl-C inside is raised at the end: it must not tear a step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt


@contextmanager
def _loading(name: str) -> Iterator[Callable[[Stage], None]]:
    """A progress bar on the terminal, if there is one; gives what `Rank` calls as it loads."""
    with start_view(Console(stderr=True, highlight=False), lambda text: None) as view:
        view.say(f"loading {name}")
        yield lambda stage: view.show([RankAt("", 0, True, stage)])
