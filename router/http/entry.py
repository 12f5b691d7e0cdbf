"""From an HTTP request to the bytes of its body: media type, size, and how long it may take to come."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from router.http.config import FrontConfig
from router.protocol.errors import HttpRefusal, echo
from router.protocol.json_entry import too_large
from workers.api.errors import InvalidRequest


def check_media_type(request: Request) -> None:
    """JSON in UTF-8, unencoded; a request without Content-Type is taken for that."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HttpRefusal(415, f"Unsupported Content-Encoding: '{echo(encoding)}'. Send the body unencoded.")
    content_type = request.headers.get("content-type")
    if content_type is None:
        return
    kind, *parameters = (p.strip().lower() for p in content_type.split(";"))
    if kind != "application/json":
        raise HttpRefusal(415, f"Unsupported Content-Type: '{echo(kind)}'. Send 'application/json'.")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in ("utf-8", "utf8"):
            raise HttpRefusal(415, f"Unsupported charset: '{echo(value)}'. Send UTF-8.")


async def read_body(request: Request, config: FrontConfig) -> bytes:
    """All bytes of a JSON body.

    Raises HttpRefusal: 415; 413 before anything is read where Content-Length says so, else as soon as it is too much;
    408 for a sender that is too slow. Raises starlette's ClientDisconnect when the sender leaves.
    """
    check_media_type(request)
    most = config.max_body_bytes
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise InvalidRequest("The Content-Length header is not a number.")
    if len(length) > 15 or int(length) > most:
        raise too_large(most)
    body = bytearray()  # not a list of pieces: two bytes a piece would take twenty times the memory
    start = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(start + config.body_deadline(0)) as deadline:
            async for piece in request.stream():
                if len(body) + len(piece) > most:
                    raise too_large(most)
                body += piece
                deadline.reschedule(start + config.body_deadline(len(body)))
    except TimeoutError:
        seconds = asyncio.get_running_loop().time() - start
        raise HttpRefusal(
            408, f"The body comes too slowly: {len(body)} bytes in {seconds:.0f} seconds.", code="request_timeout"
        ) from None
    return bytes(body)
