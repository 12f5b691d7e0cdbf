"""A body to its answer, without HTTP: what the front does, for callers inside the cluster.

The same parsing, validation, templates and limits as over HTTP; from the lease on the same path.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel

from router.dispatch.lease import Ended
from router.generation import Generator
from router.http.config import FrontConfig, ServedModel
from router.http.identity import Identity
from router.http.job import Job, JobMaker
from router.http.reading import Answer, Reading
from router.http.rounds import Histories, Round
from router.http.stories import Stories
from router.metrics import Meter, Metrics
from router.protocol.errors import HttpRefusal, answer_for, code_of, echo, is_refusal
from router.protocol.generate import GenerateBody
from router.protocol.interactive import InteractiveBody, InteractiveQosBody, cancelled
from router.protocol.json_entry import parse_object
from router.protocol.messages import MessagesBody
from router.protocol.openai import ChatBody, CompletionBody
from router.protocol.qos_bodies import QosChatBody, QosCompletionBody
from router.protocol.responses import ResponsesBody
from router.protocol.validation import validate
from router.remote_histories import LocalLine, RemoteHistories
from router.request_context import REQUEST_AT
from router.request_log import log_finished, log_kept, log_refused
from router.text.offload import TextPool
from workers.api.errors import ConfigError, EchelonError, InvalidRequest, ModelNotFound, RequestError

Body = ChatBody | CompletionBody | InteractiveBody | GenerateBody | MessagesBody | ResponsesBody
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/chat/completions_qos": QosChatBody,
    "/v1/completions_qos": QosCompletionBody,
    "/generate": GenerateBody,
    "/v1/messages": MessagesBody,
    "/v1/responses": ResponsesBody,
    "/v1/chat/interactive": InteractiveBody,
    "/v1/chat/interactive_qos": InteractiveQosBody,
}

INLINE_BYTES = 32 << 10  # parsed and checked in under 0.5 ms

Kind = TypeVar("Kind", bound=BaseModel)

log = logging.getLogger("echelon.service")


@dataclass(frozen=True, slots=True)
class Reply:
    """What HTTP would have answered."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def refused(error: BaseException) -> Reply:
    """What HTTP answers to `error`."""
    answer = answer_for(error)
    return Reply(answer.status, answer.body, answer.headers)


class Service:
    """Answers on `generator` for `models`, for `identity`. `draw_seed` gives 64 random bits, `now` seconds since 1970.

    `stories` hears of each request that has ended. `histories` keeps interactive sessions; None = in this process.
    Raises ConfigError when two models share a name.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        generator: Generator,
        *,
        config: FrontConfig | None = None,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
        now: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
        stories: Stories | None = None,
        histories: Histories | None = None,
    ) -> None:
        self._stories = stories
        self.foreign: Callable[[], Sequence[str]] = tuple  # names of models that others serve
        self.config = config or FrontConfig()
        self._models = {m.name: m for m in models}
        if len(self._models) != len(models):
            raise ConfigError("two served models share a name")
        self._generator = generator
        self._histories = histories or RemoteHistories(
            LocalLine(), ttl=self.config.session_ttl, max_sessions=self.config.max_sessions
        )
        self.metrics = metrics or Metrics()
        self.pool = TextPool(self.config.text_threads)
        self.maker = JobMaker(self.config, self.pool, draw_seed, now)
        for model in models:
            if model.tokenizer.chat is not None:
                model.tokenizer.chat.start()

    def models(self, identity: Identity) -> tuple[ServedModel, ...]:
        """Those that `identity` may use, in order."""
        return tuple(m for m in self._models.values() if identity.may_use(m.name))

    def names(self, identity: Identity) -> list[str]:
        """Names of all models that `identity` may use, our own first."""
        own = [m.name for m in self.models(identity)]
        return own + [name for name in self.foreign() if identity.may_use(name) and not self.serves(name)]

    def model(self, name: str, identity: Identity) -> ServedModel:
        """The model of that name. Raises ModelNotFound, also where `identity` may not use it."""
        model = self._models.get(name)
        if model is None or not identity.may_use(name):
            raise ModelNotFound(echo(name), self.names(identity))
        return model

    def only(self, name: str | None, identity: Identity) -> ServedModel:
        """The model of that name, or the one that `identity` may use. Raises ModelNotFound, InvalidRequest."""
        models = self.models(identity)
        if name is not None or not models:
            return self.model(name or "", identity)
        if len(models) > 1:
            raise InvalidRequest(
                "Missing required parameter: 'model': there are several here.",
                param="model",
                code="missing_required_parameter",
            )
        return models[0]

    def serves(self, name: str) -> bool:
        """Whether our own replicas have a model of that name, whoever asks."""
        return name in self._models

    async def parsed(self, body: bytes) -> dict[str, Any]:
        """The JSON object of `body`, unchecked otherwise. Raises InvalidRequest."""
        limit = self.config.max_body_bytes
        return await self.pool.run(len(body), lambda: parse_object(body, max_bytes=limit), inline=INLINE_BYTES)

    async def valid(self, kind: type[Kind], body: bytes) -> Kind:
        """`body` as a `kind`. Raises InvalidRequest for the first thing wrong with it."""
        limit = self.config.max_body_bytes
        return await self.pool.run(
            len(body), lambda: validate(kind, parse_object(body, max_bytes=limit)), inline=INLINE_BYTES
        )

    def close(self) -> None:
        """The threads and processes for text end."""
        self.pool.close()
        self.maker.close()
        for model in self._models.values():
            if model.tokenizer.chat is not None:
                model.tokenizer.chat.close()

    def meter(self, job: Job) -> Meter:
        """The meter of `job`, which starts now."""
        first = job.requests[0]
        traces = [r.trace for r in job.requests]
        meter = self.metrics.request(job.model, first.tier, first.owner, job.prompt_tokens, traces)
        came = REQUEST_AT.get()
        meter.prepared = 0.0 if came is None else max(time.monotonic() - came, 0.0)
        return meter

    def ended(self, job: Job, meter: Meter, cached_tokens: int) -> None:
        """`job` is over, for whatever reason: its meter is closed, and it is told to whom it concerns."""
        if job.round is not None:
            job.round.drop()
        meter.close()
        log_finished(job, meter, cached_tokens)
        if self._stories is not None:
            first = job.requests[0]
            self._stories.ended(
                Ended(
                    first.id.rpartition(".")[0],
                    first.owner,
                    meter.failure or meter.outcome,
                    meter.parts(),
                    None if meter.ttft is None else meter.prepared + meter.ttft,
                    meter.prompt_tokens,
                    cached_tokens,
                    meter.output_tokens,
                )
            )

    async def job(self, route: str, body: bytes, identity: Identity) -> Job:
        """The job that `body` (JSON) asks for on `route` (a key of BODIES). Raises RequestError, which is counted."""
        return await self.job_of(route, await self.checked(route, body, identity), identity)

    async def checked(self, route: str, body: bytes, identity: Identity) -> Body:
        """What `body` (JSON) says on `route` (a key of BODIES). Raises RequestError, which is counted."""
        with self._counted(route, identity):
            kind = BODIES.get(route)
            if kind is None:
                raise HttpRefusal(404, f"Invalid URL (POST {echo(route)})", code="unknown_url")
            return await self.valid(kind, body)

    async def job_of(self, route: str, checked: Body, identity: Identity) -> Job:
        """The job that `checked` asks for. An interactive session's next round begins.

        Raises RequestError, which is counted, Overloaded and NoReplica.
        """
        with self._counted(route, identity):
            return await self._job(checked, identity)

    async def cancel(self, asked: InteractiveBody, identity: Identity) -> bytes:
        """The round that runs in the session of `asked` is over: the answer that says so. Raises NoReplica."""
        assert asked.session is not None
        await self._histories.cancel(_called(asked, identity).owner, asked.session)
        return cancelled()

    @contextmanager
    def _counted(self, route: str, identity: Identity) -> Iterator[None]:
        try:
            yield
        except RequestError as e:
            self.count_refusal(route, identity, e)
            raise

    def count_kept(self, route: str, identity: Identity) -> None:
        """A request got the answer that was kept for its idempotency key."""
        self.metrics.requests.labels(identity.tier, "kept").inc()
        log_kept(identity, route)

    def count_refusal(self, route: str, identity: Identity, error: EchelonError) -> None:
        """A request ended with `error` before there was a meter for it."""
        self.metrics.refused(code_of(error))
        log_refused(identity, route, code_of(error))

    async def _job(self, checked: Body, identity: Identity) -> Job:
        identity = _called(checked, identity)
        if isinstance(checked, InteractiveBody):
            return await self._round(checked, self.only(checked.model, identity), identity)
        if isinstance(checked, GenerateBody):
            return await self.maker.generate(checked, self.only(checked.model, identity), identity)
        model = self.model(checked.model, identity)
        if isinstance(checked, ChatBody):
            return await self.maker.chat(checked, model, identity)
        if isinstance(checked, MessagesBody):
            return await self.maker.message(checked, model, identity)
        if isinstance(checked, ResponsesBody):
            return await self.maker.response(checked, model, identity)
        return await self.maker.completion(checked, model, identity)

    async def _round(self, asked: InteractiveBody, model: ServedModel, identity: Identity) -> Job:
        session = asked.session
        if session is None or not asked.interactive_mode:
            job = await self.maker.interactive(asked, model, identity)
            if session is not None:
                await self._histories.forget(identity.owner, session)
            return job
        round_ = await Round.begin(self._histories, identity.owner, session)
        try:
            return await self.maker.interactive(asked, model, identity, round_)
        except BaseException:
            round_.drop()
            raise

    async def run(self, job: Job) -> Answer:
        """The whole answer to `job`. Cancelling it aborts the sequences. Raises EchelonError."""
        meter = self.meter(job)
        reading = Reading(job, meter)
        try:
            return await reading.collect(job.by(self._generator))
        except Exception as e:
            meter.failed(code_of(e), refused=is_refusal(e))
            raise
        finally:
            self.ended(job, meter, reading.usage().cached_tokens)

    async def answer(self, route: str, body: bytes, identity: Identity) -> Answer:
        """`job`, then `run`. Raises InvalidRequest for a stream: there is nobody to read it."""
        return await self.run(await self._whole_job(route, await self.checked(route, body, identity), identity))

    async def reply(self, route: str, body: bytes, identity: Identity) -> Reply:
        """The status, headers and body that HTTP would answer with; it raises nothing but CancelledError."""
        try:
            checked = await self.checked(route, body, identity)
            if isinstance(checked, InteractiveBody) and checked.cancel:
                return Reply(200, await self.cancel(checked, identity))
            job = await self._whole_job(route, checked, identity)
            answer = await self.run(job)
        except Exception as e:
            if not isinstance(e, EchelonError):
                log.exception("a request on %s failed", route)
            return refused(e)
        return Reply(200, job.format.body(answer.choices, answer.usage))

    async def _whole_job(self, route: str, checked: Body, identity: Identity) -> Job:
        if checked.stream:
            raise InvalidRequest("Invalid 'stream': only whole answers are given here.", param="stream")
        return await self.job_of(route, checked, identity)


def _called(checked: Body, identity: Identity) -> Identity:
    """Whom `identity` is for a body of its, which may name a user."""
    user_id = None
    if isinstance(checked, QosChatBody | QosCompletionBody | InteractiveQosBody):
        user_id = checked.user_id
    if isinstance(checked, MessagesBody):
        return identity.called(None, None if checked.metadata is None else checked.metadata.user_id)
    return identity.called(user_id, None if isinstance(checked, InteractiveBody | GenerateBody) else checked.user)
