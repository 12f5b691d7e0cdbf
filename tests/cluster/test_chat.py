"""`echelon chat`: turns, commands, Ctrl-C and errors; scripted, and through a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from rich.console import Console

from cluster.chat.local import LocalAnswers
from cluster.chat.remote import RemoteAnswers, events
from cluster.chat.terminal import Conversation, printable, run_chat
from cluster.http_client import Server, Unreachable
from workers.api.errors import EchelonError

ECHELON = str(Path(sys.executable).with_name("echelon"))
# The child makes the terminal its own, so that Ctrl-C reaches it as in a shell.
# SIGINT as a login shell leaves it: what runs the tests in the background may have them ignore it.
WITH_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as s:
        s.say = lambda body: [f"echo {len(body['messages'])}: ", body["messages"][-1]["content"]]
        yield s


def script(*lines: str | BaseException | Callable[[], None]) -> Callable[[str], str]:
    """A user who types `lines`, then Ctrl-D; exceptions are raised, functions called first."""
    left = list(lines)

    def read(prompt: str) -> str:
        while left:
            line = left.pop(0)
            if isinstance(line, str):
                return line
            if isinstance(line, BaseException):
                raise line
            line()
        raise EOFError

    return read


def talk(server: FakeServer, *lines: Any, system: str | None = None, **options: Any) -> str:
    screen = io.StringIO()
    answers = RemoteAnswers(Server.parse(server.url), options.get("model"), options.get("temperature"))
    run_chat(answers, system=system, read=script(*lines), console=Console(file=screen, width=200))
    return screen.getvalue()


def roles(body: dict[str, Any]) -> list[str]:
    return [m["role"] for m in body["messages"]]


def test_turns_build_on_each_other_until_reset(server: FakeServer) -> None:
    screen = talk(server, "one", "", "  two ", "/reset", "three", "/exit", "never", system="be brief", temperature=0.5)
    assert "echo 2: one" in screen
    assert "echo 4: two" in screen
    assert "echo 2: three" in screen
    assert "never" not in screen
    first, second, third = server.bodies
    assert first == {
        "model": "fake",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}],
        "stream": True,
        "temperature": 0.5,
    }
    assert roles(second) == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == "echo 2: one"
    assert roles(third) == ["system", "user"]


def test_the_model_is_named_and_must_be_there(server: FakeServer) -> None:
    assert "other at http" in talk(server, "hi", model="other")
    assert server.bodies[0]["model"] == "other"
    assert "temperature" not in server.bodies[0]
    with pytest.raises(EchelonError, match=r"does not serve 'nope', only fake, other"):
        talk(server, model="nope")


def test_commands_ends_and_interrupts_at_the_prompt(server: FakeServer) -> None:
    screen = talk(server, "/wh[at] now", KeyboardInterrupt(), "hello", EOFError())
    assert "/wh[at] is no command" in screen
    assert screen.count("/reset forgets") == 3
    assert "echo 1: hello" in screen


def test_a_refused_question_is_taken_back(server: FakeServer) -> None:
    server.refuse = lambda body, times: (400, {}, b'{"error": {"message": "too [long]"}}') if times == 1 else None
    screen = talk(server, "one", "one")
    assert "error: too [long]" in screen
    assert [roles(b) for b in server.bodies] == [["user"], ["user"]]
    assert "echo 1: one" in screen


def test_code_has_lines_and_stands_alone(server: FakeServer) -> None:
    screen = io.StringIO()
    lines = script("def f():", '    """ <FILL>', "", "    return 1", "!!", "x = ", "!!", "/exit", "never")
    answers = RemoteAnswers(Server.parse(server.url), None, None)
    run_chat(answers, system=None, read=lines, console=Console(file=screen, width=200), code=True)
    asked = [body["messages"] for body in server.bodies]
    assert asked == [
        [{"role": "user", "content": 'def f():\n    """ <FILL>\n\n    return 1'}],
        [{"role": "user", "content": "x = "}],
    ]


def test_a_server_that_goes_does_not_end_the_chat() -> None:
    with FakeServer() as server:
        pass_away = server.http.server_close

        def end() -> None:
            server.http.shutdown()
            pass_away()

        screen = talk(server, "one", end, "two", "three")
    assert screen.count("error: cannot connect") == 2
    assert len(server.bodies) == 1


def test_what_a_model_says_does_not_steer_the_terminal(server: FakeServer) -> None:
    server.say = lambda body: ["a\x1b[2Jb\x07\r", "\u009b c\td\n\u3000\u200d\N{PARTY POPPER}[red]x"]
    screen = talk(server, "hi")
    assert "a[2Jb c\td\n\u3000\u200d\N{PARTY POPPER}[red]x" in screen
    assert "\x1b[2J" not in screen
    assert printable("a\x00\x7f\x85b") == "ab"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(server: FakeServer) -> None:
    class Interrupted:
        name = "it"

        def stream(self, messages: Any) -> Any:
            asked.append(list(messages))
            yield from ("half an ", "answer")
            if len(asked) == 1:
                raise KeyboardInterrupt
            if len(asked) == 2:
                raise Unreachable("gone")

    asked: list[list[dict[str, str]]] = []
    screen = io.StringIO()
    run_chat(Interrupted(), system=None, read=script("a", "b", "c"), console=Console(file=screen))
    assert "half an answer\n(stopped)\n" in screen.getvalue()
    assert "half an answer\nerror: gone\n" in screen.getvalue()
    assert [m["content"] for m in asked[2]] == ["a", "half an answer", "b", "half an answer", "c"]


def test_a_question_without_a_word_of_answer_is_taken_back() -> None:
    conversation = Conversation("s")
    conversation.ask("a")
    conversation.answer("")
    assert conversation.messages == [{"role": "system", "content": "s"}]


def test_events_of_a_stream() -> None:
    good = [
        b": comment\n",
        b"\n",
        b'data: {"a": 1}\r\n',
        b"event: x\n",
        b'data:{"b":2}\n',
    ]
    assert list(events([*good, b"data: [DONE]\n", b"data: {\n"])) == [{"a": 1}, {"b": 2}]
    with pytest.raises(Unreachable, match="before its end"):
        list(events(good))
    with pytest.raises(EchelonError, match="rank 0 died"):
        list(events([b'data: {"error": {"message": "rank 0 died"}}\n']))


# in a terminal of its own


class Terminal:
    """`echelon chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()
        command = [sys.executable, "-c", WITH_TERMINAL, ECHELON, "chat", *arguments]
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def await_text(self, wanted: str, *, seconds: float = 60, must: bool = True) -> bool:
        """Read until `wanted` matches what came since the last call."""
        seen, deadline = "", time.monotonic() + seconds
        while not re.search(wanted, seen, re.DOTALL):
            if time.monotonic() > deadline:
                assert not must, f"{wanted!r} did not come: {seen!r}"
                return False
            if select.select([self._master], [], [], 0.1)[0]:
                seen += os.read(self._master, 4096).decode()
        self.screen += seen
        return True

    def interrupt_until(self, wanted: str) -> None:
        """Press Ctrl-C until `wanted` matches: Python loses one that comes just before it waits for input."""
        for _ in range(30):
            self.type("\x03")
            if self.await_text(wanted, seconds=2, must=False):
                return
        pytest.fail(f"Ctrl-C brought no {wanted!r}: {self.screen!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_ctrl_c_in_a_terminal_stops_the_answer_not_the_program(server: FakeServer) -> None:
    def say(body: dict[str, Any]) -> Iterator[str]:
        yield "It was a dark and "
        if len(server.bodies) == 1:
            server.gate.clear()
        yield "stormy night"

    server.say = say  # type: ignore[assignment]
    terminal = Terminal("--url", server.url)
    try:
        terminal.await_text("fake at .*> ")
        terminal.type("tell me\n")
        terminal.await_text("dark and ")
        terminal.interrupt_until(r"\(stopped\)\s+> ")
        server.gate.set()
        terminal.interrupt_until(r"Ctrl-D\) leaves.*\s+> ")
        terminal.type("again\n")
        terminal.await_text("stormy night\\s+> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["tell me", "It was a dark and ", "again"]
    assert "Traceback" not in terminal.screen


def test_a_model_in_this_process() -> None:
    terminal = Terminal("--local", "demo", "--temperature", "0")
    try:
        terminal.await_text("in this process on .*> ")
        terminal.type("What is 3 + 4?\n")
        terminal.await_text("3 \\+ 4 = 7.*\\s> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    assert "Traceback" not in terminal.screen


def test_ctrl_c_does_not_tear_a_step_of_a_local_model() -> None:
    answers = LocalAnswers("demo", 0.0)
    question = [{"role": "user", "content": "What is 3 + 4?"}]
    whole = "".join(answers.stream(question))
    before = signal.getsignal(signal.SIGINT)
    stream = answers.stream(question)
    pieces = [next(stream)]
    engine = answers._pipeline._engine._engine  # type: ignore[attr-defined]
    step = engine.step

    def interrupted() -> Any:
        engine.step = step
        signal.raise_signal(signal.SIGINT)
        return step()

    engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(stream)
    said = "".join(pieces)
    assert whole.startswith(said)
    assert len(said) < len(whole)
    next(answers.stream(question))  # a reader that leaves
    assert signal.getsignal(signal.SIGINT) is before
    assert not engine.has_work
    engine.check_ledgers()
    assert "".join(answers.stream(question)) == whole


@pytest.mark.parametrize("more", [["--url", "http://127.0.0.1:1/v1"], ["--model", "x"]])
def test_local_takes_no_server(more: list[str]) -> None:
    done = subprocess.run([ECHELON, "chat", "--local", "demo", *more], capture_output=True, text=True, check=False)
    assert (done.returncode, "--local takes neither" in done.stderr) == (1, True)


def test_no_server_is_one_readable_line() -> None:
    with FakeServer() as server:
        url = server.url
    done = subprocess.run([ECHELON, "chat", "--url", url], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "cannot connect to" in done.stderr
    assert "Traceback" not in done.stderr
