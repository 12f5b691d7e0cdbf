"""An engine server tells how long its step takes, from another thread."""

from __future__ import annotations

import threading
import time

from workers.api.replica import LoadReport, ReplicaInfo
from workers.replica import EngineServer


class StuckEngine:
    """One step, which lasts until `go`."""

    def __init__(self) -> None:
        self.go, self.stepping = threading.Event(), threading.Event()
        self.has_work = True

    def step(self) -> list[object]:
        self.stepping.set()
        assert self.go.wait(timeout=60)
        self.has_work = False
        return []

    def load(self) -> LoadReport:
        return LoadReport(1)


def test_the_age_of_a_step_grows_and_ends_with_it() -> None:
    engine = StuckEngine()
    server = EngineServer(engine, ReplicaInfo("r", "m", "", 0, 64, 1, 4, 16), "secret")  # type: ignore[arg-type]
    server.start("127.0.0.1")
    assert server.step_age() == 0.0
    thread = threading.Thread(target=server.run)
    thread.start()
    assert engine.stepping.wait(timeout=60)
    first = server.step_age()
    time.sleep(0.01)
    assert server.step_age() > first
    engine.go.set()
    deadline = time.monotonic() + 60
    while server.step_age():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    server.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()
