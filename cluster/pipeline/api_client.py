"""`APIClient` and `client`: a running server by LMDeploy's client methods. Answers are dicts, as they came."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from cluster.chat.remote import PIECE_SECONDS, events
from cluster.environment import api_key as key_of_environment
from cluster.http_client import UNAUTHORIZED, AnswerTimeout, Server, Unreachable, error_message, no_access
from cluster.pipeline.notices import without_effect
from workers.api.errors import EchelonError

DEFAULT_URL = "http://127.0.0.1:23333"


class APIClient:
    """The server at `api_server_url` (`http://host:port`); `api_key` None = $ECHELON_API_KEY, if set.

    Calls raise EchelonError with the server's words where it refuses, Unreachable where there is none. Further keywords
    of a call are fields of its body.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, **kwargs: Any) -> None:
        for name in kwargs:
            without_effect(f"{name} of APIClient", "there is no such setting")
        url = api_server_url.replace("//0.0.0.0", "//127.0.0.1")
        if not urlsplit(url).path.strip("/"):
            url = url.rstrip("/") + "/v1"
        self._server = Server.parse(url, api_key or key_of_environment())

    @property
    def url(self) -> str:
        """The base URL, with /v1."""
        return self._server.url

    @cached_property
    def available_models(self) -> list[str]:
        """Names of the models served, looked up once."""
        return self._server.models()

    def chat_completions_v1(
        self,
        model: str,
        messages: str | Sequence[dict[str, Any]],
        temperature: float | None = 0.7,
        top_p: float | None = 1.0,
        n: int | None = 1,
        max_tokens: int | None = None,
        stream: bool | None = False,
        session_id: int = -1,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """The answer of /v1/chat/completions, or, with `stream`, its chunks."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": model, "messages": list(messages), "temperature": temperature, "top_p": top_p, "n": n}
        body |= {"max_tokens": max_tokens, "stream": stream}
        yield from self._post("/v1/chat/completions", body | _plain(session_id, kwargs))

    def completions_v1(
        self,
        model: str,
        prompt: str | list[Any],
        temperature: float | None = 0.7,
        n: int | None = 1,
        max_tokens: int | None = 16,
        stream: bool | None = False,
        top_p: float | None = 1.0,
        session_id: int = -1,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """The answer of /v1/completions, or, with `stream`, its chunks."""
        body = {"model": model, "prompt": prompt, "temperature": temperature, "n": n, "max_tokens": max_tokens}
        body |= {"stream": stream, "top_p": top_p}
        yield from self._post("/v1/completions", body | _plain(session_id, kwargs))

    def chat_interactive_v1(
        self,
        prompt: str | Sequence[dict[str, Any]],
        session_id: int = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        stop: str | list[str] | bool | None = None,
        request_output_len: int | None = None,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        """The answer of /v1/chat/interactive, or, with `stream`, its lines; of the server's first model."""
        body = {
            "model": self.available_models[0],
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "session_id": session_id,
            "interactive_mode": interactive_mode,
            "stream": stream,
            "stop": stop,
            "request_output_len": request_output_len,
            "top_p": top_p,
            "top_k": top_k,
            "temperature": temperature,
            "repetition_penalty": repetition_penalty,
            "ignore_eos": ignore_eos,
        }
        yield from self._post("/v1/chat/interactive", body | kwargs)

    def chat(
        self, prompt: str, session_id: int, request_output_len: int | None = 512, stream: bool = False, **kwargs: Any
    ) -> Iterator[tuple[str, int, str | None]]:
        """The next turn of session `session_id`: pieces of text, tokens so far, and why it ended."""
        for answer in self.chat_interactive_v1(
            prompt, session_id, True, stream=stream, request_output_len=request_output_len, **kwargs
        ):
            yield answer["text"], answer["tokens"], answer["finish_reason"]

    def encode(
        self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True
    ) -> tuple[list[Any], int | list[int]]:
        """Token ids of a text and how many they are, or lists of both for a list of texts."""
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        (answer,) = self._post("/v1/encode", body)
        return answer["input_ids"], answer["length"]

    def close(self) -> None:
        """Nothing is held between calls."""

    def _post(self, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        body = {name: value for name, value in body.items() if value is not None}
        server, connection = self._server, self._server.connection()
        try:
            server.open_connection(connection, PIECE_SECONDS)
            connection.request("POST", server.path(route), json.dumps(body), server.headers)
            response = connection.getresponse()
            if response.status == UNAUTHORIZED:
                raise no_access(server.url, response.read())
            if response.status != 200:
                raise EchelonError(error_message(response.read()))
            yield from _answers(response, stream=bool(body.get("stream")))
        except TimeoutError as e:
            raise AnswerTimeout(f"nothing came for {PIECE_SECONDS:.0f} s") from e
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"the connection to {server.url} broke: {e}") from e
        finally:
            connection.close()


def _answers(response: http.client.HTTPResponse, *, stream: bool) -> Iterator[dict[str, Any]]:
    if not stream:
        yield json.loads(response.read())
    elif "ndjson" in response.getheader("content-type", ""):
        for line in response:
            if line.strip():
                value = json.loads(line)
                if "error" in value:
                    raise EchelonError(error_message(line))
                yield value
    else:
        yield from events(response)


def _plain(session_id: int, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` for a plain route, which keeps nothing between requests."""
    if session_id != -1:
        without_effect("session_id of chat_completions_v1 and completions_v1", "chat_interactive_v1 has sessions")
    return fields


def client(api_server_url: str = DEFAULT_URL, api_key: str | None = None, **kwargs: Any) -> APIClient:
    """A client of the server at that URL."""
    return APIClient(api_server_url, api_key, **kwargs)
