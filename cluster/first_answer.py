"""Whether a cluster that was started answers, and what to say where it does not. No Ray."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from workers.api.errors import EchelonError

POLL_SECONDS = 0.2
WATCH_SECONDS = 5.0  # a look costs Serve's controller time that the replicas need
ANSWER_SECONDS = 10.0  # then it asks again: while a request waits in the queue, nobody watches
FINAL = (400, 401, 403)  # statuses that trying again does not change; 404 is a front that is not there yet


def base_url(host: str, port: int, *, tls: bool = False) -> str:
    """Where a client on this machine finds what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}/v1" if ":" in host else f"{scheme}://{host}:{port}/v1"


def await_answer(
    url: str,
    model: str,
    deadline_seconds: float,
    watch: Callable[[], object] = lambda: None,
    *,
    key: str = "",
    trust: ssl.SSLContext | None = None,
) -> None:
    """Return once one token came back over HTTP. Raises EchelonError when the deadline passes, or at a refusal.

    `watch` is called every WATCH_SECONDS; what it raises ends the wait. `trust` is for https.
    """
    body = {"model": model, "prompt": "Hello!", "max_tokens": 1}  # not a chat: a base model has no template
    request = urllib.request.Request(
        f"{url}/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
    )
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),  # a proxy of the environment is not asked
        urllib.request.HTTPSHandler(context=trust),
    )
    deadline, last = time.monotonic() + deadline_seconds, ""
    watched = time.monotonic()
    while time.monotonic() < deadline:
        if time.monotonic() - watched > WATCH_SECONDS:
            watch()
            watched = time.monotonic()
        try:
            with direct.open(request, timeout=ANSWER_SECONDS) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as e:
            last = e.read(500).decode(errors="replace")
            if e.code in FINAL:
                raise EchelonError(f"{url} refuses a first request: {last}") from e
        except OSError as e:
            last = str(e)
        time.sleep(POLL_SECONDS)
    raise EchelonError(f"no answer from {url} within {deadline_seconds:.0f} s; the last one: {last}")


def cause(message: str) -> str:
    """What a traceback inside `message` ends with, without the class of an error of ours; else all of `message`."""
    _, ours, text = message.rpartition(f"{EchelonError.__module__}.")
    if ours:
        return text.partition(": ")[2].strip() or text.strip()
    return message.strip().rpartition("\n")[2] if "Traceback" in message else message.strip()
