"""How a batch job's lines reach the cluster: over HTTP, or by Ray handles. Both are called from many threads."""

from __future__ import annotations

import http.client
import socket
import threading
from typing import Any, Protocol

from cluster.client import Handle
from cluster.http_client import AnswerTimeout, Server, Unreachable, no_access
from router.service import Reply, refused
from workers.api.errors import NotAuthorized

_STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


class Transport(Protocol):
    """Asks and waits."""

    def models(self) -> list[str]:
        """Names of the models served. Raises EchelonError when there is no server."""

    def send(self, route: str, body: bytes) -> Reply:
        """The answer to one POST. Raises Unreachable or AnswerTimeout."""

    def abort(self) -> None:
        """Every `send` under way raises at once, and so does every later one."""

    def close(self) -> None:
        """Nothing is left open. No `send` may be under way."""


class HttpTransport:
    """One connection a thread, kept open. `timeout`: seconds for one answer."""

    def __init__(self, server: Server, timeout: float) -> None:
        self._server, self._timeout = server, timeout
        self._own = threading.local()
        self._lock = threading.Lock()
        self._connections: list[http.client.HTTPConnection] = []
        self._sockets: dict[int, socket.socket] = {}  # by thread
        self._aborted = False

    def models(self) -> list[str]:
        """GET /v1/models."""
        return self._server.models()

    def send(self, route: str, body: bytes) -> Reply:
        """POST; once more when a connection that was kept open turns out to be closed."""
        while True:
            connection, is_kept = self._connection()
            try:
                connection.request("POST", self._server.path(route), body, self._server.headers)
                response = connection.getresponse()
                return Reply(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})
            except TimeoutError as e:
                connection.close()
                raise AnswerTimeout(f"no answer within {self._timeout:.0f} s") from e
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                if not (is_kept and isinstance(e, _STALE)):
                    raise Unreachable(f"{self._server.url}: {type(e).__name__}: {e}") from e

    def abort(self) -> None:
        """Shuts every socket: reads on it end."""
        with self._lock:
            self._aborted = True
            for sock in self._sockets.values():
                _shut(sock)

    def close(self) -> None:
        """Closes every connection."""
        for connection in self._connections:
            connection.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, open, and whether it was open before."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self._server.connection()
            self._connections.append(connection)
        is_kept = connection.sock is not None
        if not is_kept:
            self._server.open_connection(connection, self._timeout)
        with self._lock:
            self._sockets[threading.get_ident()] = connection.sock
            if self._aborted:
                connection.close()
                raise Unreachable("the job was stopped")
        return connection, is_kept


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed already


class RayTransport:
    """Calls of a cluster's gateway. `timeout`: seconds for one answer."""

    def __init__(self, handle: Handle, timeout: float) -> None:
        import ray

        self._ray: Any = ray
        self._handle, self._timeout = handle, timeout
        self._lock = threading.Lock()
        self._refs: set[Any] = set()
        self._aborted = False

    def models(self) -> list[str]:
        """What the gateway serves."""
        try:
            return list(self._ray.get(self._handle.models.remote(), timeout=self._timeout))
        except NotAuthorized as e:
            raise no_access("the cluster", refused(e.cause).body) from e  # type: ignore[attr-defined]
        except self._ray.exceptions.RayError as e:
            raise Unreachable(f"the gateway does not answer: {e}") from e

    def send(self, route: str, body: bytes) -> Reply:
        """`Gateway.reply`."""
        with self._lock:
            if self._aborted:
                raise Unreachable("the job was stopped")
            ref = self._handle.reply.remote(route, body)
            self._refs.add(ref)
        try:
            reply: Reply = self._ray.get(ref, timeout=self._timeout)
        except self._ray.exceptions.GetTimeoutError as e:
            self._ray.cancel(ref)
            raise AnswerTimeout(f"no answer within {self._timeout:.0f} s") from e
        except self._ray.exceptions.RayError as e:
            raise Unreachable(f"the gateway: {e}") from e
        finally:
            with self._lock:
                self._refs.discard(ref)
        return reply

    def abort(self) -> None:
        """Cancels every call: the gateway aborts its sequences."""
        with self._lock:
            self._aborted = True
            refs = list(self._refs)
        for ref in refs:
            self._ray.cancel(ref)

    def close(self) -> None:
        """The Ray connection is the process's: it stays."""
