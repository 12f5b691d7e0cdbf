"""The conversation of `echelon chat`: what is typed, what is said, and the commands between."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from workers.api.errors import EchelonError

PROMPT = "> "
CODE_END = "!!"
COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"

Message = dict[str, str]  # role and content


class Answers(Protocol):
    """Who answers. `name` is shown."""

    name: str

    def stream(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """The next message, piece by piece. Closing the generator stops it. Raises EchelonError."""


class Conversation:
    """The messages so far; `system`, if any, stays in front of them."""

    def __init__(self, system: str | None = None) -> None:
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)

    def reset(self) -> None:
        """Nothing was said."""
        self.messages = list(self._start)

    def ask(self, text: str) -> None:
        """The user's turn."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The answer to the last question; without a word of it the question is taken back."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()


def read_code(read: Callable[[str], str]) -> str:
    """Lines up to one that is "!!", or a command. Raises what `read` raises."""
    lines = [read(PROMPT)]
    while lines[-1] != CODE_END and not (len(lines) == 1 and lines[0].startswith("/")):
        lines.append(read(""))
    return "\n".join(lines[:-1] if lines[-1] == CODE_END else lines)


def run_chat(
    answers: Answers, *, system: str | None, read: Callable[[str], str], console: Console, code: bool = False
) -> None:
    """Talk until /exit or the end of input. `read` shows a prompt and returns a line, as `input` does.

    `code`: what is typed may have several lines, is taken as it stands, and each time stands alone.
    """
    conversation = Conversation(system)
    console.print(f"{escape(answers.name)}. {COMMANDS}.", style="dim", soft_wrap=True)
    if code:
        console.print(f"{CODE_END} in a line of its own ends what is asked", style="dim")
    while True:
        try:
            text = read_code(read) if code else read(PROMPT).strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(f"\n{COMMANDS}", style="dim")
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
            console.print("the conversation starts anew", style="dim")
        elif text.startswith("/"):
            console.print(f"{escape(text.split()[0])} is no command. {COMMANDS}.", style="dim")
        elif text:
            if code:
                conversation.reset()
            conversation.ask(text)
            conversation.answer(_show_answer(answers, conversation.messages, console))


def _show_answer(answers: Answers, messages: Sequence[Message], console: Console) -> str:
    """What was said, also where Ctrl-C or an error ended it."""
    pieces: list[str] = []
    note = ""
    try:
        with contextlib.closing(answers.stream(messages)) as stream:
            for piece in stream:
                pieces.append(piece)
                console.file.write(printable(piece))
                console.file.flush()
    except KeyboardInterrupt:
        note = "[dim](stopped)[/]"
    except EchelonError as e:
        note = f"[bold red]error:[/] {escape(str(e))}"
    console.print()
    if note:
        console.print(note, soft_wrap=True)
    return "".join(pieces)


def printable(text: str) -> str:
    """`text` without control characters: what a model says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
