"""The pages' files as HTTP answers: what is packaged under `static/`, read once.

Scripts and styles lie in a folder named after the digest of all of them, so that browsers keep them for ever; pages are
asked for anew each time, and mostly answered with 304. Nothing inline runs: the policy allows this server's files only,
and scripts no way from text to HTML.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGES = {"/chat": "chat.html", "/operator": "operator.html"}
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
FOLDER_MARK = "{{folder}}"  # in a page: where scripts and styles are
_KEPT = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it goes out."""

    body: bytes
    kind: str  # media type
    etag: str
    cache: str  # cache-control

    def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = {**HEADERS, "etag": self.etag, "cache-control": self.cache}
        known = request.headers.get("if-none-match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.kind)


def read_assets() -> Mapping[str, Asset]:
    """All files by the path of their URL."""
    folder = importlib.resources.files("router.web") / "static"
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.name.rpartition(".")[2] in TYPES}
    pages = set(PAGES.values())
    digest = hashlib.sha256()
    for name in sorted(files.keys() - pages):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    place = f"/web/{digest.hexdigest()[:12]}"
    found = {f"{place}/{name}": _asset(name, files[name], _KEPT) for name in files.keys() - pages}
    for path, name in PAGES.items():
        found[path] = _asset(name, files[name].replace(FOLDER_MARK.encode(), place.encode()), "no-cache")
    return found


def asset_routes(assets: Mapping[str, Asset]) -> list[Route]:
    """A route for each of them: GET and HEAD."""
    return [Route(path, _endpoint(asset), include_in_schema=False) for path, asset in assets.items()]


def _endpoint(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    async def show(request: Request) -> Response:
        return asset.answer(request)

    return show


def _asset(name: str, body: bytes, cache: str) -> Asset:
    tag = hashlib.sha256(body).hexdigest()[:16]
    return Asset(body, TYPES[name.rpartition(".")[2]], f'"{tag}"', cache)
