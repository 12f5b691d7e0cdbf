"""The keys of a file that may change while the server runs."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from router.http.identity import Identity
from router.keys.file import parse_keys, read_key_file
from router.keys.ring import KeyEntry, KeyRing
from workers.api.errors import ConfigError

POLL_SECONDS = 1.0

log = logging.getLogger("echelon.keys")


class LiveKeys:
    """The ring of the file at `path`, and the keys of `own`, which no file takes away.

    A thread looks at the file once in `poll_seconds`; requests only read an attribute. A file that turns bad or
    vanishes is refused whole and said in the log, and the last good one stays. Raises ConfigError where the first one
    is bad.
    """

    def __init__(self, path: Path, *, own: tuple[KeyEntry, ...] = (), poll_seconds: float = POLL_SECONDS) -> None:
        self._path, self._own = path, own
        self._signature = self._look()
        self._settled = False
        self._refused = ""  # why, if the last text was
        self._text = read_key_file(path)
        self._ring = self._parsed(self._text)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(poll_seconds,), name="api-keys", daemon=True)
        self._thread.start()

    def identity(self, key: bytes | None) -> Identity:
        """See `KeyRing.identity`."""
        return self._ring.identity(key)

    def close(self) -> None:
        """The thread ends; the keys stay as they are."""
        self._closing.set()
        self._thread.join()

    def look(self) -> None:
        """Take the file's new state, if it has one."""
        signature = self._look()
        if signature == self._signature and self._settled:
            return
        # Two writes within one tick of the file system's clock look alike: after a change the text is read twice.
        self._settled = signature == self._signature
        self._signature = signature
        try:
            text = read_key_file(self._path)
            if text == self._text:
                return
            self._text = text
            self._ring = self._parsed(text)
        except ConfigError as e:
            if str(e) != self._refused:
                log.error("the API keys stay as they were: %s", e)
            self._refused = str(e)
            return
        self._refused = ""
        log.info("API keys of %s read again: %d", self._path, len(self._ring.entries) - len(self._own))

    def _watch(self, poll_seconds: float) -> None:
        while not self._closing.wait(poll_seconds):
            try:
                self.look()
            except Exception:  # a defect here must not end the watch: keys could be revoked no more
                log.exception("the API keys stay as they were")

    def _parsed(self, text: bytes) -> KeyRing:
        return KeyRing((*parse_keys(text, str(self._path)).entries, *self._own))

    def _look(self) -> tuple[int, ...]:
        """What changes when the file does; empty where it cannot be looked at, which reading it will explain."""
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)
