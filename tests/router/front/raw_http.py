"""HTTP/1.1 by hand, over a socket: what a client sees, byte for byte."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

HANGS_SECONDS = 30.0  # an answer that has not come by then never comes


@dataclass(frozen=True)
class Answer:
    """A whole answer; `closes` says that the server wants no more on this connection."""

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The parsed events of a stream that ended well; fails unless `[DONE]` comes once, and last."""
        *events, last, nothing = self.body.decode("ascii").split("\n\n")
        assert (last, nothing) == ("data: [DONE]", ""), self.body[-200:]
        assert all(e.startswith("data: {") for e in events), events
        return [json.loads(e.removeprefix("data: ")) for e in events]


class Connection:
    """One connection to the server; opened again after the server closed it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def post(self, path: str, body: bytes, content_type: str | None = "application/json", pieces: int = 0) -> Answer:
        """The answer to one POST. Raises TimeoutError where none comes, ConnectionError where it is cut off."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=HANGS_SECONDS)
        head = [f"POST {path} HTTP/1.1", "host: front"]
        if content_type is not None:
            head.append(f"content-type: {content_type}")
        if pieces:
            head.append("transfer-encoding: chunked")
            size = len(body) // pieces + 1
            cuts = [body[i : i + size] for i in range(0, len(body), size)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in cuts) + b"0\r\n\r\n"
        else:
            head.append(f"content-length: {len(body)}")
        self._socket.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        answer = self._read(self._socket)
        if answer.closes:
            self.close()
        return answer

    def close(self) -> None:
        """The client goes away."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @staticmethod
    def _read(s: socket.socket) -> Answer:
        with s.makefile("rb") as stream:
            status = int(_line(stream).split()[1])
            headers = {}
            while line := _line(stream).rstrip(b"\r\n"):
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            if headers.get("transfer-encoding") == "chunked":
                parts = []
                while size := int(_line(stream), 16):
                    parts.append(_exactly(stream, size))
                    assert _line(stream) == b"\r\n"
                assert _line(stream) == b"\r\n"
                body = b"".join(parts)
            else:
                body = _exactly(stream, int(headers["content-length"]))
        return Answer(status, headers, body, headers.get("connection", "").lower() == "close")


def _line(stream: Any) -> bytes:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ConnectionError(f"cut off after {line!r}")
    return bytes(line)


def _exactly(stream: Any, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ConnectionError(f"cut off {size - len(data)} bytes before the end")
    return bytes(data)
