"""The gateway: an actor whose calls give ObjectRefs, for batch jobs by Ray handles. A thin shell around
`router.service`: from the lease on, its requests take the same path as those over HTTP.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.access import keys_for_handles
from cluster.client import Generated, GeneratedChoice
from cluster.config import ClusterConfig
from cluster.dispatcher_actor import locate_dispatcher
from cluster.logs import set_up_logs
from cluster.names import GATEWAY, NAMESPACE
from cluster.placement import Layout
from cluster.served_model import served_models
from router.dispatch.client import DispatcherClient
from router.engine_link import EngineLinks
from router.metrics_page import FrontMetrics
from router.perplexity import get_ppl
from router.remote_histories import RemoteHistories
from router.remote_stories import RemoteStories
from router.request_context import enter
from router.service import Reply, Service, refused
from router.sessions import Sessions
from workers.api.errors import EchelonError, EngineFault, InvalidRequest, NotAuthorized

MOST_IN_FLIGHT = 4096  # calls that run; the others wait at the actor, in order
TASK_RETRIES = 3  # of a call whose gateway died under it


def body_of(prompt: Any, sampling: dict[str, Any], default_model: str) -> tuple[str, bytes]:
    """Route and JSON body of one call: a chat where `prompt` is a list of messages, else a completion.

    Raises InvalidRequest for what JSON cannot hold.
    """
    is_chat = isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], dict)
    body = {"model": default_model, "messages" if is_chat else "prompt": prompt, **sampling}
    try:
        text = json.dumps(body)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidRequest(f"the prompt or an option is not what JSON can hold: {e}") from e
    return "/v1/chat/completions" if is_chat else "/v1/completions", text.encode()


def in_flight_limit(max_waiting: int) -> int:
    """Calls that run at once: batch jobs alone never fill the dispatcher's queue of `max_waiting` requests."""
    return max(64, min(MOST_IN_FLIGHT, max_waiting // 2))


def _bytes(key: str | None) -> bytes | None:
    return None if key is None else key.encode(errors="replace")


@dataclass(frozen=True, slots=True)
class Served:
    """What a cluster runs. `versions` tell the replicas of each model from those that ran before; `edge` is what the
    proxy before the ingresses shows them (empty: what follows from `secret`); `layouts` are by model, too.
    """

    config: ClusterConfig
    secret: str = field(repr=False)
    versions: Mapping[str, str]
    edge: str = field(default="", repr=False)
    layouts: Mapping[str, Layout] = field(default_factory=dict)


class Gateway:
    """Ray restarts it when it dies, and calls it was running start again."""

    def __init__(self, served: Served) -> None:
        config, secret = served.config, served.secret
        set_up_logs(config.log.level, config.log.format)
        self._models = served_models(config)
        self._served, self._secret = served, secret
        self._keys = keys_for_handles(config, secret)
        self._service: Service | None = None

    async def served(self) -> Served:
        """What runs, for an upgrade."""
        return self._served

    async def upgraded(self, served: Served) -> None:
        """This runs now. A gateway that was restarted since tells of what ran at the start."""
        self._served = served

    async def generate(self, key: str | None, prompt: Any, /, **sampling: Any) -> Generated:
        """The answer to `prompt` (text, token ids, or messages), with the fields of the OpenAI body as `sampling`; of
        the cluster's first model, where that says no other.

        `key` is the caller's API key, here as in all calls.

        Raises EchelonError: what HTTP would answer with an error body. `ray.cancel` aborts the sequences.
        """
        try:
            identity = self._keys.identity(_bytes(key))
            service = self._open()
            route, body = body_of(prompt, sampling, self._models[0].name)
            answer = await service.answer(route, body, identity)
        except EchelonError as e:
            raise e.with_traceback(None) from None  # the caller reads the message, not our frames
        except Exception as e:
            logging.getLogger("echelon.gateway").exception("a request failed")
            raise EngineFault(f"the gateway failed: {type(e).__name__}") from None
        choices = zip(answer.choices, answer.token_ids, strict=True)
        given = (
            GeneratedChoice(c.text, ids, c.finish, tuple(t.logprobs for t in c.tokens or ())) for c, ids in choices
        )
        return Generated(tuple(given), answer.usage)

    async def get_ppl(self, key: str | None, prompts: Any, /, model: str | None = None) -> float | list[float]:
        """How badly the model predicts `prompts` (text or token ids, or a list of them): see `Handle.get_ppl`.

        Raises EchelonError.
        """
        try:
            identity = self._keys.identity(_bytes(key))
            return await get_ppl(self._open(), identity, prompts, model or self._models[0].name)
        except EchelonError as e:
            raise e.with_traceback(None) from None
        except Exception as e:
            logging.getLogger("echelon.gateway").exception("a request failed")
            raise EngineFault(f"the gateway failed: {type(e).__name__}") from None

    async def reply(self, key: str | None, route: str, body: bytes) -> Reply:
        """What HTTP would answer to a POST of `body` (JSON) to `route`: status, headers, body."""
        try:
            identity = self._keys.identity(_bytes(key))
        except NotAuthorized as e:
            return refused(e)
        return await self._open().reply(route, body, identity)

    async def models(self, key: str | None) -> tuple[str, ...]:
        """Names of the models that `key` may use. Raises NotAuthorized."""
        try:
            identity = self._keys.identity(_bytes(key))
        except NotAuthorized as e:
            raise e.with_traceback(None) from None
        return tuple(m.name for m in self._open().models(identity))

    def _open(self) -> Service:
        """The service, for a new request; connections belong to the event loop, so that they start with the first."""
        enter(f"req-{uuid.uuid4().hex}")
        if self._service is None:
            name = f"gateway-{os.getpid()}-{uuid.uuid4().hex}"
            dispatcher = DispatcherClient(name, secret=self._secret, locate=locate_dispatcher)
            dispatcher.start()
            sessions = Sessions(dispatcher, EngineLinks(name, secret=self._secret))
            http = self._served.config.http
            self._service = Service(
                self._models,
                sessions,
                stories=RemoteStories(dispatcher),
                histories=RemoteHistories(dispatcher, ttl=http.session_ttl, max_sessions=http.max_sessions),
            )
            self._metrics = FrontMetrics(dispatcher, self._service.metrics)
            self._metrics.start()  # the ingresses show them
        return self._service


def start_gateway(served: Served) -> Any:
    """Start the one gateway of this Ray cluster, beside its dispatcher."""
    return (
        ray.remote(Gateway)
        .options(
            name=GATEWAY,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            max_concurrency=in_flight_limit(served.config.dispatch.max_waiting),
        )
        .remote(served)
    )


def stop_gateway() -> None:
    """End it, if there is one; its calls fail."""
    with contextlib.suppress(ValueError):  # it had not started
        ray.kill(ray.get_actor(GATEWAY, namespace=NAMESPACE))
