"""Step plans from rank 0 to the other ranks of its replica: shared memory on a node, TCP across nodes.

Every rank connects one stream socket to rank 0. A rank on the same host then maps the sender's ring, a file in shared
memory that is unlinked once all have attached; from there on a plan is one copy into the ring and one byte, the
doorbell, on each socket. The receiver polls the ring for `SPIN_SECONDS` and then blocks on the socket: no CPU when
idle. (Python's own SharedMemory is unlinked for everybody when one attached process is killed.) Ranks elsewhere get the
same record over their socket. The end of a socket is the end of the gang: receivers see EOF and return.
"""

from __future__ import annotations

import hmac
import logging
import mmap
import os
import secrets
import socket
import struct
import tempfile
import time
from typing import Any

from workers.api.errors import WireError
from workers.api.wire import FrameCodec
from workers.engine.plan import StepMasks, StepPlan

SPIN_SECONDS = 50e-6
RING_BYTES = 8 << 20  # for plans
MASK_BYTES = 40 << 10  # of a row: vocabularies of over 300,000 tokens
ATTACH_SECONDS = 120.0  # ranks import torch and load weights before they attach
GREETING_SECONDS = 5.0
_HEAD = struct.Struct("<Q")  # number of plans written so far
_RECORD = struct.Struct("<I")
_APART = struct.Struct("<QI")  # where a record lies that is not in the ring, and its length
_IS_APART = 0xFFFFFFFF  # its length in the ring
_DATA = 64  # records start here, on a cache line of their own
_CODEC = FrameCodec({0: StepPlan, 1: StepMasks})

log = logging.getLogger("echelon.plans")


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = sock.recv(count - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _write_line(sock: socket.socket, *words: str) -> None:
    sock.sendall(("\0".join(words) + "\n").encode())


def _read_line(sock: socket.socket) -> list[str]:
    line = bytearray()
    while not line.endswith(b"\n"):
        if len(line) > 4096:
            raise WireError("a greeting of over 4096 bytes")
        line += _read_exactly(sock, 1)
    return line[:-1].decode().split("\0")


def host_id() -> str:
    """Equal for processes that share a kernel and its /dev/shm, as far as a host can tell."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        shm = os.stat("/dev/shm")
        return f"{f.read().strip()}-{shm.st_dev}-{shm.st_ino}"


class PlanSender:
    """Rank 0's end. `listen`, tell the others the address, then `accept` them, then `send`.

    `masked_rows`: how many sequences of a step may draw under masks. Where that is much, it lies behind the ring, with
    room for two steps in turns.
    """

    def __init__(self, host: str, receivers: int, masked_rows: int = 0) -> None:
        self._listener = socket.create_server((host, 0))
        self._receivers = receivers
        self._apart_bytes, self._apart = MASK_BYTES * masked_rows, 0
        self._near: list[socket.socket] = []
        self._far: list[socket.socket] = []
        self._names: dict[socket.socket, str] = {}
        self._ring: mmap.mmap | None = None
        self._count = 0
        self._at = _DATA
        self.secret = secrets.token_hex(16)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for the receivers."""
        name = self._listener.getsockname()
        return str(name[0]), int(name[1])

    def accept(self) -> None:
        """Wait for every receiver to attach; strangers are sent away. Raises TimeoutError."""
        fd, path = tempfile.mkstemp(prefix="echelon-plans-", dir="/dev/shm")
        try:
            size = RING_BYTES + 2 * self._apart_bytes  # the rest takes no memory until it is written
            os.ftruncate(fd, size)
            self._ring = mmap.mmap(fd, size)
            deadline = time.monotonic() + ATTACH_SECONDS
            while len(self._near) + len(self._far) < self._receivers:
                self._listener.settimeout(max(0.001, deadline - time.monotonic()))
                sock, peer = self._listener.accept()
                try:
                    self._attach(sock, path)
                except (WireError, OSError, EOFError, ValueError) as e:
                    sock.close()
                    log.warning("%s wanted our plans and is no rank of ours: %s", peer[0], e or "it left")
        finally:
            os.close(fd)
            os.unlink(path)
            self._listener.close()

    def _attach(self, sock: socket.socket, path: str) -> None:
        sock.settimeout(GREETING_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secret, boot_id, name = _read_line(sock)
        if not hmac.compare_digest(secret.encode(), self.secret.encode()):
            raise WireError("wrong secret")
        _write_line(sock, path if boot_id == host_id() else "")
        mapped = _read_line(sock) == ["mapped"]
        sock.settimeout(None)
        self._names[sock] = name
        (self._near if mapped else self._far).append(sock)

    def send(self, plan: StepPlan | StepMasks) -> None:
        """Hand one plan, or the last one's masks, to every receiver. Raises ConnectionError, naming one that is gone.

        A receiver must have taken a plan before the ring comes round to it again: collectives keep ranks within one
        step of each other, and a ring holds hundreds of plans.
        """
        frame = _CODEC.encode(plan)
        if self._near:
            self._publish(frame)
        for sock in self._far:
            try:
                sock.sendall(frame)
            except OSError as e:
                raise self._gone(sock, e) from e

    def _publish(self, frame: bytes) -> None:
        assert self._ring is not None
        record: bytes | memoryview = memoryview(frame)[4:]
        length = len(record)
        if RING_BYTES // 8 < length <= self._apart_bytes:
            at = RING_BYTES + self._apart * self._apart_bytes
            self._ring[at : at + length] = bytes(record)
            self._apart = 1 - self._apart
            record, length = _APART.pack(at, length), _IS_APART
        need = _RECORD.size + len(record)
        if need > RING_BYTES - _DATA:
            raise WireError(f"a plan of {len(record)} bytes is over the ring's {RING_BYTES - _DATA}")
        if self._at + need > RING_BYTES - _RECORD.size:
            _RECORD.pack_into(self._ring, self._at, 0)  # wrap: go on at the start
            self._at = _DATA
        _RECORD.pack_into(self._ring, self._at, length)
        self._ring[self._at + _RECORD.size : self._at + need] = bytes(record)
        self._at += need
        self._count += 1
        _HEAD.pack_into(self._ring, 0, self._count)
        for sock in self._near:
            try:
                sock.send(b"\1", socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue  # thousands of doorbells wait there already: it will wake
            except OSError as e:
                raise self._gone(sock, e) from e

    def _gone(self, sock: socket.socket, error: OSError) -> ConnectionError:
        return ConnectionError(f"{self._names[sock]} takes no plans any more: {error.strerror or error}")

    def close(self) -> None:
        """End the gang: receivers return None."""
        for sock in (*self._near, *self._far):
            sock.close()
        self._listener.close()


class PlanReceiver:
    """The end of a rank > 0. `name` is for messages of the sender's side."""

    def __init__(self, address: tuple[str, int], secret: str, name: str = "a rank") -> None:
        self._sock = socket.create_connection(address, timeout=ATTACH_SECONDS)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ring: mmap.mmap | None = None
        _write_line(self._sock, secret, host_id(), name)
        try:
            (path,) = _read_line(self._sock)
        except (EOFError, ConnectionError) as e:
            self._sock.close()
            raise WireError("rank 0 refused this rank: is the secret the gang's?") from e
        if path:
            with open(path, "r+b") as f:
                self._ring = mmap.mmap(f.fileno(), 0)  # all of it
        _write_line(self._sock, "mapped" if self._ring else "stream")
        self._sock.settimeout(None)
        self._taken = 0
        self._at = _DATA

    def receive(self) -> StepPlan | StepMasks | None:
        """The next plan, or the masks of the last one; None when rank 0 is gone."""
        try:
            body = self._from_socket() if self._ring is None else self._from_ring(self._ring)
        except (EOFError, ConnectionError):
            return None
        sent: StepPlan | StepMasks = _CODEC.decode(body)
        return sent

    def _from_socket(self) -> bytes:
        (length,) = _RECORD.unpack(_read_exactly(self._sock, _RECORD.size))
        return _read_exactly(self._sock, length)

    def _from_ring(self, ring: mmap.mmap) -> bytes:
        deadline = time.perf_counter() + SPIN_SECONDS
        while self._written(ring) == self._taken:
            if time.perf_counter() > deadline and not self._sock.recv(4096):
                raise EOFError
        (length,) = _RECORD.unpack_from(ring, self._at)
        if length == 0:
            self._at = _DATA
            (length,) = _RECORD.unpack_from(ring, self._at)
        at = self._at + _RECORD.size
        if length == _IS_APART:
            self._at = at + _APART.size
            at, length = _APART.unpack_from(ring, at)
        else:
            self._at = at + length
        self._taken += 1
        return ring[at : at + length]

    @staticmethod
    def _written(ring: mmap.mmap) -> int:
        count: Any = _HEAD.unpack_from(ring, 0)[0]
        return int(count)

    def close(self) -> None:
        """Leave."""
        self._sock.close()
