"""A running server as `echelon batch` and `echelon chat` reach it: the standard library's HTTP client, one URL."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from workers.api.errors import ConfigError, EchelonError

CONNECT_SECONDS = 10.0
MODELS_SECONDS = 30.0
UNAUTHORIZED = 401


class Unreachable(EchelonError):
    """The server cannot be connected to, or the connection broke before the answer was there."""


class NoAccess(Unreachable):
    """The server does not take the key, or asks for one that is not set."""


class AnswerTimeout(EchelonError):
    """The server has not answered in time."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server. `prefix` stands for `/v1` in front of its routes; `key` is its API key, if any."""

    scheme: str
    host: str
    port: int
    prefix: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Server:
        """From `http[s]://host[:port][/v1]`. Raises ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ConfigError(f"{url!r} is not a URL: {e}") from e
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is not of the form http://host:port/v1")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("$ECHELON_API_KEY is not a key: it has spaces or characters beyond ASCII")
        port = port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/") or "/v1", key)

    @property
    def url(self) -> str:
        """The base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    def path(self, route: str) -> str:
        """Where `route` ("/v1/...") is on this server."""
        return self.prefix + route.removeprefix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        return headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def connection(self) -> http.client.HTTPConnection:
        """A connection that is not open yet; `open_connection` opens it."""
        if self.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self.host, self.port, timeout=CONNECT_SECONDS, context=context)
        return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_SECONDS)

    def open_connection(self, connection: http.client.HTTPConnection, timeout: float) -> None:
        """Connect; afterwards each read waits up to `timeout` seconds. Raises Unreachable."""
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"cannot connect to {self.url}: {e}") from e
        connection.sock.settimeout(timeout)

    def models(self) -> list[str]:
        """Names of the models served, in the server's order.

        Raises Unreachable, NoAccess, or EchelonError with the server's answer.
        """
        connection = self.connection()
        try:
            self.open_connection(connection, MODELS_SECONDS)
            connection.request("GET", self.path("/v1/models"), headers=self.headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise Unreachable(f"no answer from {self.url}: {type(e).__name__}: {e}") from e
        finally:
            connection.close()
        if response.status == UNAUTHORIZED:
            raise no_access(self.url, body)
        if response.status != 200:
            raise EchelonError(f"{self.url}/models answered {response.status}: {error_message(body)}")
        try:
            names = [str(m["id"]) for m in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as e:
            raise EchelonError(f"{self.url}/models is not an OpenAI-compatible list of models") from e
        if not names:
            raise EchelonError(f"{self.url} serves no model")
        return names


def no_access(where: str, body: bytes) -> NoAccess:
    """The error for a 401 with `body`."""
    return NoAccess(f"{where} gives no access: {error_message(body)} Set $ECHELON_API_KEY to a key of this server.")


def error_of(body: bytes) -> dict[str, Any] | None:
    """The error object of an OpenAI-compatible error body; None where `body` is none."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else None


def error_message(body: bytes) -> str:
    """What an error body says, in at most 500 characters."""
    error = error_of(body)
    return str(error.get("message")) if error else body[:500].decode("utf-8", "replace")
