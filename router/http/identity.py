"""Who asks. The resolver is the seam for API keys: it sees every request but those of the health routes."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.datastructures import Headers

from router.protocol.errors import HttpRefusal
from workers.api.errors import NotAuthorized


@dataclass(frozen=True, slots=True)
class Identity:
    """An owner, its tier, what keeps its prefix cache apart, and the models it may use (None: all).

    `metrics`: it may read /metrics, which name all owners. `admin`: it may see and change what is everybody's.
    `believed`: it is whoever it says, there being no keys. `sub`: which of the owner's own users asks, by the body.
    """

    owner: str = "default"
    tier: str = ""
    salt: bytes = b""
    models: frozenset[str] | None = None
    metrics: bool = False
    admin: bool = False
    believed: bool = False
    sub: str = ""

    def called(self, user_id: str | None, user: str | None) -> Identity:
        """Who asks, by a body's `user_id` and OpenAI's `user`: they divide the owner, and never make another one of it.

        Where there are no keys, `user_id` is the owner.
        """
        if self.believed and user_id is not None:
            return replace(self, owner=user_id, salt=user_id.encode(), sub=user or "")
        sub = user_id or user
        return replace(self, sub=sub) if sub else self

    def may_use(self, model: str) -> bool:
        """Whether `model` exists for this owner; one that does not is answered like one that is not served."""
        return self.models is None or model in self.models


def require_admin(identity: Identity) -> None:
    """Raises HttpRefusal (403) where `identity` is no admin's."""
    if not identity.admin:
        raise HttpRefusal(403, "This is for admins only: their keys say 'admin: true'.", code="admin_only")


class IdentityResolver(Protocol):
    """Headers to identity."""

    def resolve(self, headers: Headers, client: str | None) -> Identity:
        """Who sent these headers from address `client`. Raises NotAuthorized, Overloaded."""


class NoKeys:
    """Everybody is the owner "default"; without keys only loopback addresses are served, unless told otherwise.

    Whoever is served may read /metrics; loopback is admin, and believed what it calls itself.

    Behind a proxy on the same machine every client has a loopback address: then the proxy's own bind address decides.

    A browser on this machine has a loopback address, too, whatever page it shows: pages of other sites than `origins`
    ("*": all) may not ask.
    """

    def __init__(self, *, loopback_only: bool = True, origins: Collection[str] = ()) -> None:
        self._loopback_only, self._origins = loopback_only, origins

    def resolve(self, headers: Headers, client: str | None) -> Identity:
        """The default identity. Raises NotAuthorized for an address that is not loopback, HttpRefusal (403) for a page
        of another site.
        """
        if self._loopback_only and not _is_loopback(client):
            raise NotAuthorized("This server has no API keys and therefore answers loopback addresses only.")
        origin = headers.get("origin")
        if origin is not None and _is_elsewhere(origin, headers) and not {origin, "*"}.intersection(self._origins):
            raise HttpRefusal(
                403,
                "This server has no API keys and therefore answers no pages of other sites: start it with "
                "--allow-origins and theirs, or with --api-keys.",
                code="other_site",
            )
        near = _is_loopback(client)
        return Identity(metrics=True, admin=near, believed=near)


def _is_elsewhere(origin: str, headers: Headers) -> bool:
    """Whether a page of `origin` (browsers tell it ahead of all but plain reading) is another site's than ours."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin.partition("://")[2] != headers.get("host")


def _is_loopback(client: str | None) -> bool:
    if client is None:  # a Unix socket
        return True
    try:
        return ipaddress.ip_address(client.split("%")[0]).is_loopback
    except ValueError:
        return False
