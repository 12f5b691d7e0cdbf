"""`echelon chat`: who answers, and a terminal to ask from."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console

from cluster.chat.remote import RemoteAnswers
from cluster.chat.terminal import Answers, run_chat
from cluster.environment import api_key
from cluster.http_client import Server


def chat_with_server(
    url: str, model: str | None, *, system: str | None, temperature: float | None, key: str | None = None
) -> None:
    """Talk to a running server; `key` None = $ECHELON_API_KEY. Raises EchelonError when there is none at `url`."""
    _talk(RemoteAnswers(Server.parse(url, key or api_key()), model, temperature), system)


def chat_in_process(model: str, *, system: str | None, temperature: float | None, **options: Any) -> None:
    """Talk to a model in this process; `options` are those of `echelon.pipeline`.

    Raises EchelonError when it cannot be loaded.
    """
    from cluster.chat.local import LocalAnswers

    code = options.get("capability") not in (None, "chat")
    _talk(LocalAnswers(model, temperature, **options), system, code=code)


def _talk(answers: Answers, system: str | None, *, code: bool = False) -> None:
    with contextlib.suppress(ImportError):  # a Python without it has no line editing
        import readline  # noqa: F401 - `input` uses it once it is there
    run_chat(answers, system=system, read=input, console=Console(highlight=False), code=code)
