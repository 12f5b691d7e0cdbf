"""The process that runs one checkpoint's chat template: little can be reached from it, and little used.

Its standard input is a socket to the process that asked for it (`router.text.template_process`), where msgpack values
go both ways, in order. First comes `[source, variables, cpu_seconds, memory_bytes, max_characters]`, answered by
`[READY]`, or by `[BROKEN, reason]` and the end; then conversations, each answered by one of

    [TEXT, prompt]
    [REFUSED, message, param, code]

The kernel ends the process when one conversation (or compiling) takes more CPU time than allowed; it ends by itself
when its parent closes the socket or dies. It has no environment, opens no file and no socket, and starts no process.
"""

from __future__ import annotations

import codecs
import pprint
import resource
import signal
import socket
import sys
import textwrap
from datetime import datetime

import jinja2.constants
import jinja2.debug
import msgpack

from router.text.templates import ChatTemplate, Conversation, TemplateFailure
from workers.api.errors import ConfigError, InvalidRequest

READY, BROKEN, TEXT, REFUSED = range(4)
# What jinja and Python load when a template first needs it: afterwards no file can be opened.
PRELOADED = (jinja2.constants, jinja2.debug, pprint, textwrap, codecs.decode(b"\\N{BULLET}", "unicode_escape"))
_STANDARD_FILES = 3


def limit_resources(memory_bytes: int) -> None:
    """At most so much address space; no file beyond those open, no process, no core dump."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_NOFILE: _STANDARD_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


class _Stopwatch:
    """Inside of it the process may use `seconds` of CPU time; then SIGPROF, left at its default, ends it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(pipe: socket.socket) -> None:
    """Answer on `pipe` until the other side closes it."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    template: ChatTemplate | None = None
    while data := pipe.recv(1 << 18):
        unpacker.feed(data)
        for frame in unpacker:
            if template is None:
                source, variables, cpu_seconds, memory_bytes, max_characters = frame
                limit_resources(memory_bytes)
                stopwatch = _Stopwatch(cpu_seconds)
                try:
                    with stopwatch:
                        template = ChatTemplate(source, variables)
                except ConfigError as e:
                    reason = str(e).replace("the chat template", "it", 1)
                    pipe.sendall(msgpack.packb([BROKEN, reason]))
                    return
                answer: list[object] = [READY]
            else:
                with stopwatch:
                    answer = _answer(template, frame, max_characters)
            pipe.sendall(msgpack.packb(answer))


def _answer(template: ChatTemplate, frame: list[object], max_characters: int) -> list[object]:
    *fields, now = frame
    try:
        text = template.render(Conversation(*fields), datetime.fromisoformat(str(now)))  # type: ignore[arg-type]
        if len(text) > max_characters:
            raise TemplateFailure(f"it writes more than {max_characters} characters")
    except InvalidRequest as e:
        return [REFUSED, e.message, e.param, e.code]
    return [TEXT, text]


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with socket.socket(fileno=0) as pipe:
        try:
            serve(pipe)
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(0)  # the parent is gone


if __name__ == "__main__":
    main()
