"""Renders a checkpoint's template in processes of its own: it may loop, take all memory or crash, and only they notice.

A conversation that goes over a limit ends its process and is refused (400, `chat_template_failed`); those behind it
go to the process that takes its place. A process takes a few conversations ahead, so that it never waits for this
event loop, and no more than a few, so that a slow one holds up as few as possible.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime

import msgpack

from router.text.template_process import RenderLimits, Task, TemplateProcess
from router.text.templates import Conversation, TemplateFailure
from workers.api.errors import EchelonError, Overloaded

AHEAD = 4  # conversations that one process has at a time
RETRY_SECONDS = 1.0  # after a process that never became ready

log = logging.getLogger("echelon.text")


class TemplatePool:
    """A `Renderer`: the template `source` in up to `limits.processes` processes, started as they are needed.

    All conversations come from one event loop. What goes wrong is logged (where `logs` says so), once for each kind,
    with `name`: a template that always fails is its checkpoint's fault, and its operator does not see what clients are
    told.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        *,
        name: str = "",
        logs: bool = True,
        limits: RenderLimits | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._limits = li = limits or RenderLimits()
        self._setup: bytes = msgpack.packb([source, dict(variables), li.cpu_seconds, li.memory_bytes, li.characters])
        self._name, self._logs, self._now = name, logs, now
        self._processes: list[TemplateProcess] = []
        self._waiting: deque[Task] = deque()
        self._logged: set[str] = set()
        self._start_failure = TemplateFailure("")
        self._retry_at = 0.0
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [p.pid for p in self._processes]

    def start(self) -> None:
        """Start the first process; it loads beside this one."""
        if not self._processes:
            self._add()

    def close(self) -> None:
        """All processes have ended; conversations under way are refused."""
        self._closed = True
        stopping = Overloaded("The server is stopping.")
        processes, self._processes = self._processes, []
        for process in processes:
            process.end()
            _refuse(process.tasks, stopping)
        _refuse(self._waiting, stopping)

    async def render(self, conversation: Conversation) -> str:
        """The prompt's text. Raises InvalidRequest, and Overloaded when too many conversations wait."""
        if self._closed or len(self._waiting) >= self._limits.waiting:
            raise Overloaded("Too many conversations wait for the chat template.")
        c, now = conversation, self._now().isoformat()
        frame: bytes = msgpack.packb(
            [c.messages, c.tools, c.add_generation_prompt, c.continue_final_message, c.variables, c.documents, now]
        )
        task = Task(frame, asyncio.get_running_loop().create_future())
        self._waiting.append(task)
        self.pump()
        return await task.prompt

    def pump(self) -> None:
        """Give what waits to the process with the least work; start another where none is idle."""
        while self._waiting:
            if self._waiting[0].prompt.done():  # its reader has gone
                self._waiting.popleft()
                continue
            ready = [p for p in self._processes if p.ready]
            least = min(ready, key=lambda p: len(p.tasks), default=None)
            if (least is None or least.tasks) and len(ready) == len(self._processes) < self._limits.processes:
                self._grow()
            for process in self._processes:
                process.connect()
            if least is None or len(least.tasks) >= AHEAD:
                return
            least.give(self._waiting.popleft())

    def _grow(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._add()
        if not self._processes:
            _refuse(self._waiting, self._start_failure)

    def _add(self) -> None:
        try:
            self._processes.append(TemplateProcess(self, self._setup, self._limits))
        except OSError as e:
            self._never_ready(TemplateFailure(f"its process does not start: {e}"))

    def failed(self, message: str) -> None:
        """See `Owner`."""
        self._log("answer", message)

    def lost(self, process: TemplateProcess) -> None:
        """See `Owner`."""
        if process not in self._processes:
            return  # we have ended it
        self._processes.remove(process)
        failure = process.end()
        if process.ready:
            self._log(failure.message, failure.message)
            head = deque([process.tasks.popleft()] if process.tasks else [])
            _refuse(head, failure)
            self._waiting.extendleft(reversed(process.tasks))
        else:
            self._never_ready(failure)
        self.pump()

    def _never_ready(self, failure: TemplateFailure) -> None:
        self._start_failure = failure
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._log(failure.message, failure.message)

    def _log(self, kind: str, message: str) -> None:
        if self._logs and kind not in self._logged:
            self._logged.add(kind)
            log.error("chat template of %s: %s (said once)", self._name, message)


def _refuse(tasks: deque[Task], error: EchelonError) -> None:
    """Empties `tasks`."""
    while tasks:
        prompt = tasks.popleft().prompt
        if not prompt.done():
            prompt.set_exception(error)
