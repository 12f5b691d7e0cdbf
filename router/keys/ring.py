"""API keys as the front knows them: by the SHA-256 of each, with the owner and the rights it stands for."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass

from router.http.identity import Identity
from workers.api.errors import NotAuthorized

PREFIX = "ek-"  # by which a key is known for one, to people and to scanners for leaked secrets
RANDOM_BYTES = 32
_SHOWN = 4  # characters of each end in a message
_LEAST_MASKED = 24  # a shorter key would show too great a part of itself
_PLAIN = frozenset(string.ascii_letters + string.digits + "-_.")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key. `digest` is its SHA-256 (32 bytes); `models` None = all that are served; see `Identity` for `admin`."""

    digest: bytes
    owner: str
    tier: str = ""
    models: frozenset[str] | None = None
    revoked: bool = False
    admin: bool = False

    @property
    def id(self) -> str:
        """What the key is called in lists and on the command line; it says nothing of the key."""
        return self.digest.hex()[:12]


class KeyRing:
    """All keys of one file. Immutable: a change of the file makes a new ring."""

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        self.entries = tuple(entries)
        self._identities = {e.digest: None if e.revoked else _identity(e) for e in self.entries}

    def identity(self, key: bytes | None) -> Identity:
        """Whose `key` this is. Raises NotAuthorized: no key (None or empty), an unknown or a revoked one."""
        if not key:
            raise NotAuthorized("This server asks for an API key: send it as 'Authorization: Bearer KEY'.")
        # Digests are looked up, never keys: how long that takes tells nothing that helps to find a key.
        digest = digest_of(key)
        identity = self._identities.get(digest)
        if identity is not None:
            return identity
        what = "This API key was revoked" if digest in self._identities else "Incorrect API key provided"
        raise NotAuthorized(f"{what}: {masked(key)}.", code="invalid_api_key")


def _identity(entry: KeyEntry) -> Identity:
    return Identity(
        entry.owner,
        entry.tier,
        entry.owner.encode(),
        entry.models,
        metrics=entry.admin,
        admin=entry.admin,
    )


def digest_of(key: bytes) -> bytes:
    """What stands for `key` in files and in memory.

    Plain SHA-256 is enough: keys are 256 random bits and cannot be guessed, so that a salt and a slow hash, which
    passwords need, would only cost time in every request.
    """
    return hashlib.sha256(key).digest()


def make_key() -> str:
    """A new key from the system's random source."""
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def masked(key: bytes) -> str:
    """`key` for a message: its two ends at most, printable."""
    if len(key) < _LEAST_MASKED:
        return "*" * 8
    head, tail = key[:_SHOWN].decode("latin-1"), key[-_SHOWN:].decode("latin-1")
    return "".join(c if c in _PLAIN else "?" for c in head) + "*" * 8 + "".join(c if c in _PLAIN else "?" for c in tail)
