"""From the Authorization header to an identity."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from starlette.datastructures import Headers

from router.http.identity import Identity
from router.keys.floods import FloodGuard
from workers.api.errors import NotAuthorized, Overloaded

LOG_SECONDS = 10.0  # at least, between two lines about wrong keys

log = logging.getLogger("echelon.keys")


class Keys(Protocol):
    """A ring, or one that changes."""

    def identity(self, key: bytes | None) -> Identity:
        """Whose `key` this is. Raises NotAuthorized."""


class KeyResolver:
    """The `IdentityResolver` of a front with API keys. The header is the only place where a key is looked for."""

    def __init__(
        self, keys: Keys, guard: FloodGuard | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys, self._clock = keys, clock
        self._guard = FloodGuard(clock=clock) if guard is None else guard
        self._wrong = 0  # since the last line in the log
        self._logged = float("-inf")

    def resolve(self, headers: Headers, client: str | None) -> Identity:
        """Raises NotAuthorized, and Overloaded where an address sends many wrong keys."""
        values = [value for name, value in headers.raw if name == b"authorization"]
        if len(values) > 1:  # a proxy before us and we might each believe another one
            raise NotAuthorized("There is more than one Authorization header.")
        key = bearer_key(values[0]) if values else None
        try:
            return self._keys.identity(key)
        except NotAuthorized as e:
            if key is None:
                raise
            self._log(client)
            wait = self._guard.wrong(client)
            if wait > 0:
                raise Overloaded("Too many wrong API keys come from this address.", retry_after=wait) from e
            raise

    def _log(self, client: str | None) -> None:
        self._wrong += 1
        now = self._clock()
        if now - self._logged >= LOG_SECONDS:
            log.warning("%d wrong API keys since the last such line, the last one from %r", self._wrong, client)
            self._wrong, self._logged = 0, now


def bearer_key(value: bytes) -> bytes | None:
    """The key of an Authorization header (RFC 6750, RFC 9110 11.1); None where it brings none."""
    scheme, _, key = value.strip(b" \t").partition(b" ")
    return key.lstrip(b" ") or None if scheme.lower() == b"bearer" else None
