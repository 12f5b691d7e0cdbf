"""One process that runs a chat template (`router.text.template_worker`), as its parent's event loop sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import msgpack

from router.text.template_worker import BROKEN, READY, TEXT
from router.text.templates import TemplateFailure
from workers.api.errors import InvalidRequest

_ROOT = Path(__file__).parents[2]
_GRACE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one conversation may take of a template's process, and how many processes and conversations there are."""

    cpu_seconds: float = 1.0
    wall_seconds: float = 10.0  # a process that is stopped or swapped out uses no CPU time
    start_seconds: float = 60.0
    memory_bytes: int = 512 << 20  # of address space, the interpreter's own 30 MB included
    characters: int = 16 << 20  # of one prompt
    processes: int = 2
    waiting: int = 4096  # conversations; beyond it 429


@dataclass(slots=True)
class Task:
    """A conversation, packed, and who waits for its prompt."""

    frame: bytes
    prompt: asyncio.Future[str]


class Owner(Protocol):
    """Hears of what changes."""

    def pump(self) -> None:
        """The process has become ready, or has room for another conversation."""

    def failed(self, message: str) -> None:
        """The template went wrong on a conversation; its process lives."""

    def lost(self, process: TemplateProcess) -> None:
        """The process has ended; `process.tasks` are unanswered."""


class TemplateProcess(asyncio.Protocol):
    """Starts the process at once; `connect` before `give`. Raises OSError when it cannot start."""

    def __init__(self, owner: Owner, setup: bytes, limits: RenderLimits) -> None:
        self.ready = False
        self.tasks: deque[Task] = deque()  # it has them, oldest first
        self._owner, self._limits = owner, limits
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._fate = ""  # why it ends, where we know before it does
        self._unpacker = msgpack.Unpacker(max_buffer_size=limits.characters * 4 + 1024)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -S: no .pth file of site-packages runs; -P: nothing of the current folder is imported.
                [sys.executable, "-S", "-P", "-m", "router.text.template_worker"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])},
            )
        self._socket.sendall(setup)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def connect(self) -> None:
        """Read and write in the running event loop from now on."""
        if self._connecting is None:
            loop = asyncio.get_running_loop()
            self._connecting = loop.create_task(self._connect())

    async def _connect(self) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._socket)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type
        if self._ended:
            self._transport.abort()
        else:
            self._expect_answer(self._limits.start_seconds)

    def give(self, task: Task) -> None:
        """One more conversation; only once `ready`."""
        assert self._transport is not None
        self.tasks.append(task)
        self._transport.write(task.frame)
        if len(self.tasks) == 1:
            self._expect_answer(self._limits.wall_seconds)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._unpacker.feed(data)
        for answer in self._unpacker:
            self._take(answer)
        self._owner.pump()

    def _take(self, answer: list[Any]) -> None:
        kind, *fields = answer
        self._cancel_timer()
        if kind == READY:
            self.ready = True
        elif kind == BROKEN:
            self._fate = fields[0]
        else:
            prompt = self.tasks.popleft().prompt
            error = None if kind == TEXT else InvalidRequest(fields[0], param=fields[1], code=fields[2])
            if error is not None and error.code is not None:
                self._owner.failed(error.message)
            if prompt.done():
                pass  # its reader has gone
            elif error is None:
                prompt.set_result(fields[0])
            else:
                prompt.set_exception(error)
        if self.tasks:
            self._expect_answer(self._limits.wall_seconds)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        self._owner.lost(self)

    def end(self) -> TemplateFailure:
        """Kill it, if it lives; afterwards it is gone. Returns what it died of."""
        self._ended = True
        self._cancel_timer()
        if self._transport is not None:
            self._transport.abort()
        elif self._connecting is None:
            self._socket.close()
        self._process.kill()
        code = self._process.wait()  # at once: it is dead or dying
        if self._fate:
            return TemplateFailure(self._fate)
        if code == -signal.SIGPROF:
            return TemplateFailure(f"it used more than {self._limits.cpu_seconds:g} s of CPU time")
        return TemplateFailure(f"its process ended with {f'signal {-code}' if code < 0 else f'code {code}'}")

    def _expect_answer(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._suspect, seconds)

    def _suspect(self, seconds: float) -> None:
        # Where this loop itself was held up, the answer is here already and will be read before the next look.
        self._timer = asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        self._fate = f"it took more than {seconds:g} s"
        self._process.kill()  # the socket's end tells the rest

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
