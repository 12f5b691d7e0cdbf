"""Answers of a running server, streamed over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from cluster.chat.terminal import Message
from cluster.http_client import UNAUTHORIZED, AnswerTimeout, Server, Unreachable, error_message, no_access
from workers.api.errors import EchelonError

ROUTE = "/v1/chat/completions"
PIECE_SECONDS = 600.0  # the longest wait for the next piece: the first may stand in a queue


class RemoteAnswers:
    """Of `model` on `server` (None: its first one). Raises EchelonError when there is no such server or model."""

    def __init__(self, server: Server, model: str | None, temperature: float | None) -> None:
        served = server.models()
        if model is not None and model not in served:
            raise EchelonError(f"{server.url} does not serve {model!r}, only {', '.join(served)}")
        self._server, self._model, self._temperature = server, model or served[0], temperature
        self.name = f"{self._model} at {server.url}"

    def stream(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """See `cluster.chat.terminal.Answers`. Closing cuts the connection, which aborts the request there."""
        body: dict[str, Any] = {"model": self._model, "messages": list(messages), "stream": True}
        if self._temperature is not None:
            body["temperature"] = self._temperature
        connection = self._server.connection()
        try:
            self._server.open_connection(connection, PIECE_SECONDS)
            connection.request("POST", self._server.path(ROUTE), json.dumps(body), self._server.headers)
            response = connection.getresponse()
            if response.status == UNAUTHORIZED:
                raise no_access(self._server.url, response.read())
            if response.status != 200:
                raise EchelonError(error_message(response.read()))
            for event in events(response):
                yield from (c["delta"].get("content") or "" for c in event.get("choices", ()))
        except TimeoutError as e:
            raise AnswerTimeout(f"nothing came for {PIECE_SECONDS:.0f} s") from e
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"the connection to {self._server.url} broke: {e}") from e
        finally:
            connection.close()


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of a stream up to `[DONE]`. Raises EchelonError for an error event, Unreachable without an end."""
    for line in lines:
        name, _, data = line.strip().partition(b":")
        if name != b"data":
            continue
        if data.strip() == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise EchelonError(error_message(data))
        yield event
    raise Unreachable("the stream broke off before its end")
