"""Asking for cables through a folder."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from chaos.cables import Cables, serve_cables


def test_what_is_asked_for_is_done_once_and_in_order(tmp_path: Path) -> None:
    done: list[tuple[str, str]] = []
    acts = {act: (lambda host, act=act: done.append((act, host))) for act in ("cut", "heal")}
    over = threading.Event()
    server = threading.Thread(target=serve_cables, args=(tmp_path, acts, lambda: not over.is_set()))
    server.start()
    cables = Cables(tmp_path)
    before = time.monotonic()
    first = cables.ask("cut", "h2")
    second = cables.ask("heal", "h2")
    over.set()
    server.join()
    assert done == [("cut", "h2"), ("heal", "h2")]
    assert before <= first <= second <= time.monotonic()
