"""The output file of a batch job, which is also its memory: what stands in it is done."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from cluster.batch.lines import RECORD_START, Key, Record, recorded
from workers.api.errors import ConfigError, EchelonError


class Journal:
    """`path`, opened for appending and locked against a second job. `done` has the keys of all lines in it.

    A last line that was torn by a death while it was written is cut off; `torn` says so. Raises ConfigError, with the
    file as it was, when it holds anything that is no output of a batch job, or when another job writes it.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[Key] = set()
        self.failed = 0
        self.torn = False
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise ConfigError(f"cannot write {path}: {e.strerror}") from e
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: Record) -> None:
        """The record is in the file (not yet on the disk), and its key is done. Raises EchelonError."""
        if record.key in self.done:
            raise AssertionError(f"{record.key} is written already")
        left = memoryview(record.text)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as e:
            raise EchelonError(f"cannot write {self._path}: {e.strerror}; make room and run the same again") from e
        self.done.add(record.key)
        self.failed += record.failed

    def close(self) -> None:
        """All of it is on the disk."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(f"another batch job is writing {self._path}") from e

    def _read(self) -> None:
        end = 0  # of the last whole line
        with open(self._path, "rb") as f:
            for number, raw in enumerate(f, start=1):
                if not raw.endswith(b"\n"):
                    self._cut(raw, number, end)
                    return
                known = recorded(raw)
                if known is None:
                    raise self._foreign(number)
                if known[0] in self.done:
                    raise ConfigError(f"{self._path}:{number}: {known[0][1]!r} is there a second time")
                self.done.add(known[0])
                self.failed += known[1]
                end += len(raw)

    def _cut(self, tail: bytes, number: int, end: int) -> None:
        # Zeros are what a file system may leave where it had made room but not written yet.
        ours = tail.startswith(RECORD_START) or RECORD_START.startswith(tail) or not tail.strip(b"\0")
        if not ours:
            raise self._foreign(number)
        os.ftruncate(self._file, end)
        self.torn = True

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(f"{self._path}:{number} is no output of a batch job: name another file, or move it away")
