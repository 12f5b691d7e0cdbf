"""What a prefix cache has gained and lost since somebody last asked, for whoever keeps an index of it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from workers.api.hashing import SHORT_BYTES
from workers.api.replica import CacheNews


class CacheJournal:
    """Net changes by hash. `held` gives all hashes of the cache.

    Nothing is written until the first `take`, and nothing after more than `most_unread` changes that nobody took: then
    the next reader is told everything anew.
    """

    def __init__(self, held: Callable[[], Iterable[bytes]], most_unread: int) -> None:
        self._held, self._most_unread = held, most_unread
        self._changes: dict[bytes, bool] = {}  # hash -> whether it is in the cache now; oldest first
        self._anew = True  # nobody knows anything

    def gained(self, digest: bytes) -> None:
        """`digest` can be hit from now on."""
        self._write(digest, True)

    def lost(self, digest: bytes) -> None:
        """`digest` is gone."""
        self._write(digest, False)

    def begin_anew(self) -> None:
        """A new reader knows nothing: the next news tell all."""
        self._anew = True
        self._changes.clear()

    def take(self, most: int) -> CacheNews | None:
        """News of at most `most` blocks, the oldest first; None if there are none. The rest stays for the next call."""
        anew = self._anew
        if anew:
            self._changes = dict.fromkeys(self._held(), True)
            self._anew = False
        elif not self._changes:
            return None
        taken = list(islice(self._changes.items(), most))
        for digest, _ in taken:
            del self._changes[digest]
        gained = b"".join([digest[:SHORT_BYTES] for digest, is_held in taken if is_held])
        lost = b"".join([digest[:SHORT_BYTES] for digest, is_held in taken if not is_held])
        return CacheNews(gained, lost, anew)

    def _write(self, digest: bytes, is_held: bool) -> None:
        if self._anew:
            return
        if len(self._changes) >= self._most_unread:
            self.begin_anew()
        else:
            self._changes[digest] = is_held
