"""A model whose ranks run in a Ray cluster of this process: whole answers go by Ray handles, streams over HTTP."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

from rich.console import Console

from cluster.chat.remote import events
from cluster.client import Generated, connect
from cluster.config import ClusterConfig, HttpSection, resolve_model
from cluster.environment import free_port, prepare_ray
from cluster.http_client import Server, Unreachable, error_message
from cluster.pipeline.answers import Response
from cluster.pipeline.questions import Question
from cluster.served_model import served_model
from cluster.start_view import start_view
from workers.api.errors import ConfigError, EchelonError, InvalidRequest

PIECE_SECONDS = 600.0  # the longest wait for the next piece of a stream
HALF = 2**63

Pieces = queue.SimpleQueue[Response | Exception | None]


class RayEngine:
    """The model of `config`, served on a free port of loopback until `close`. Raises EchelonError."""

    def __init__(self, config: ClusterConfig) -> None:
        prepare_ray()
        import ray

        if ray.is_initialized():
            raise ConfigError(
                "this process has joined a Ray cluster: start the model there (echelon serve --address auto) and ask "
                "through echelon.connect(), or make the pipeline before ray.init"
            )
        from cluster.app import bring_down, bring_up
        from cluster.start_watch import watched_start

        self._ray: Any = ray
        own = config.model_copy(update={"http": HttpSection(port=free_port())})
        console = Console(stderr=True, highlight=False)
        try:
            with start_view(console, lambda text: None) as view, watched_start(view.show):
                up = bring_up(own, address=None, progress=view.say)
        except BaseException:
            bring_down(own_ray=True)
            raise
        self._handle = connect()
        self._server = Server.parse(up.base_url)
        self.model = served_model(own, resolve_model(own.model.path, own.model.revision))
        self.device = f"{own.model.tensor_parallel} ranks"

    def pieces(self, questions: Sequence[Question], *, whole: bool) -> Generator[Response, None, None]:
        """See `Engine`. Token ids and log-probabilities come with whole answers only."""
        return self._whole(questions) if whole else self._streamed(questions)

    def _whole(self, questions: Sequence[Question]) -> Generator[Response, None, None]:
        left = {self._handle.generate.remote(list(q.request.prompt_ids), **_fields(q)): q for q in questions}
        try:
            while left:
                (done,), _ = self._ray.wait(list(left), num_returns=1)
                question = left.pop(done)
                yield from _responses(question, self._ray.get(done))
        finally:
            for ref in left:
                self._ray.cancel(ref)

    def _streamed(self, questions: Sequence[Question]) -> Generator[Response, None, None]:
        if any(q.config.logprobs is not None for q in questions):
            raise InvalidRequest("logprobs are not streamed with tp > 1: call the pipeline itself", param="logprobs")
        pieces: Pieces = queue.SimpleQueue()
        streams = [_Stream(self._server, question, pieces) for question in questions]
        left = len(streams)
        try:
            for stream in streams:
                stream.start()
            while left:
                piece = pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for stream in streams:
                stream.close()

    def losses(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """See `Engine`."""
        found: list[float] = self._ray.get(self._handle.get_ppl.remote([list(ids) for ids in prompts]))
        return found

    def close(self) -> None:
        """The cluster has ended."""
        from cluster.app import bring_down

        bring_down(own_ray=True)


class _Stream:
    """One question over HTTP, read in a thread of its own. `pieces` gets its pieces, then None, or an error."""

    def __init__(self, server: Server, question: Question, pieces: Pieces) -> None:
        self._server, self._question, self._pieces = server, question, pieces
        self._connection = server.connection()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        """Ask."""
        self._thread.start()

    def close(self) -> None:
        """The connection is cut, which aborts what runs."""
        self._connection.close()

    def _read(self) -> None:
        q, server = self._question, self._server
        body = {"model": q.request.model, "prompt": list(q.request.prompt_ids), "stream": True, "logprobs": 0}
        counts = [0] * len(q.choices)
        try:
            server.open_connection(self._connection, PIECE_SECONDS)
            self._connection.request(
                "POST", server.path("/v1/completions"), json.dumps(body | _fields(q)), server.headers
            )
            response = self._connection.getresponse()
            if response.status != 200:
                raise EchelonError(error_message(response.read()))
            for event in events(response):
                for choice in event.get("choices", ()):
                    counts[choice["index"]] += len((choice.get("logprobs") or {}).get("tokens", ()))
                    self._pieces.put(_piece_of(q, choice, counts[choice["index"]]))
            self._pieces.put(None)
        except EchelonError as e:
            self._pieces.put(e)
        except (OSError, http.client.HTTPException, ValueError) as e:
            self._pieces.put(Unreachable(f"the stream broke: {type(e).__name__}: {e}"))


def _fields(question: Question) -> dict[str, Any]:
    """The fields of a completion's body that say how this question is answered."""
    first, config = question.request.samplings[0], question.config
    fields = config.body() | {
        "max_tokens": first.max_tokens,
        "min_tokens": first.min_tokens,
        "seed": first.seed - 2 * HALF if first.seed >= HALF else first.seed,
        "stop": list(config.stop_words or ()),
    }
    return fields if config.logprobs is None else fields | {"logprobs": config.logprobs}


def _piece_of(question: Question, choice: dict[str, Any], count: int) -> Response:
    return Response(
        text=choice.get("text") or "",
        generate_token_len=count,
        input_token_len=question.input_tokens,
        finish_reason=choice.get("finish_reason"),
        index=question.place * len(question.choices) + choice["index"],
    )


def _responses(question: Question, generated: Generated) -> Generator[Response, None, None]:
    n = len(question.choices)
    for c, choice in enumerate(generated.choices):
        logprobs = None
        if question.config.logprobs is not None:
            logprobs = [{t.token_id: t.logprob, **dict(t.top)} for t in choice.logprobs]
        yield Response(
            text=choice.text,
            generate_token_len=len(choice.token_ids),
            input_token_len=question.input_tokens,
            finish_reason=choice.finish_reason,
            token_ids=list(choice.token_ids),
            logprobs=logprobs,
            index=question.place * n + c,
        )
