"""Chained block hashes: a block's hash covers everything before it, so equal hashes mean equal prefixes.

Both the prefix cache of an engine and the dispatcher's index of them need the same bytes, so the rule lives here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

from workers.api.request import MediaSegment

HASH_BYTES = 16
SHORT_BYTES = 8  # of a hash, where it only guides a choice and nothing is shared by it


def prompt_salt(salt: bytes, prompt_tokens: int, apart_from: int | None) -> bytes:
    """The salt of a prompt of so many tokens: over `apart_from` of them it shares blocks with prompts of its own length
    only (None: with all).
    """
    apart = apart_from is not None and prompt_tokens > apart_from
    return salt + b"\0prompt" + prompt_tokens.to_bytes(4, "little") if apart else salt


def root_hash(salt: bytes = b"", adapter: str | None = None) -> bytes:
    """The hash before the first block: what must never be shared differs here."""
    h = hashlib.blake2b(digest_size=HASH_BYTES)
    name = (adapter or "").encode()
    h.update(len(salt).to_bytes(4, "little") + salt + len(name).to_bytes(4, "little") + name)
    return h.digest()


def extend_hash(parent: bytes, token_ids: Sequence[int], media: Sequence[bytes] = ()) -> bytes:
    """The hash of a full block of `token_ids` after `parent`; `media` are the digests of images that touch it."""
    h = hashlib.blake2b(parent + struct.pack(f"<{len(token_ids)}I", *token_ids), digest_size=HASH_BYTES)
    for digest in media:
        h.update(digest)
    return h.digest()


def chained_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    salt: bytes = b"",
    adapter: str | None = None,
    media: Sequence[MediaSegment] = (),
) -> Iterator[bytes]:
    """Hashes of all full blocks of `token_ids`, first to last, each made when it is asked for."""
    parent = root_hash(salt, adapter)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        digests: tuple[bytes, ...] = ()
        if media:
            digests = tuple(m.digest for m in media if m.start < start + block_size and start < m.start + m.length)
        parent = extend_hash(parent, token_ids[start : start + block_size], digests)
        yield parent


def block_hashes(
    token_ids: Sequence[int],
    block_size: int,
    *,
    salt: bytes = b"",
    adapter: str | None = None,
    media: Sequence[MediaSegment] = (),
) -> list[bytes]:
    """The same, all at once."""
    return list(chained_hashes(token_ids, block_size, salt=salt, adapter=adapter, media=media))
