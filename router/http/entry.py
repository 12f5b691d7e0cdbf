"""From an HTTP request to the bytes of its body: media type and size."""

from __future__ import annotations

from starlette.requests import Request

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


async def read_body(request: Request, max_bytes: int) -> bytes:
    """All bytes of a JSON body. Raises HttpRefusal: 415, or 413 as soon as they are more than `max_bytes`."""
    check_media_type(request)
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise InvalidRequest("The Content-Length header is not a number.")
    if len(length) > 15 or int(length) > max_bytes:
        raise too_large(max_bytes)
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:
            raise too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)
