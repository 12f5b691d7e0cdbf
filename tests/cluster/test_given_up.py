"""A supervisor whose replica the dispatcher has given up ends its gang and itself."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import engine_deployment
from cluster.engine_deployment import Replica
from router.dispatch.server import Orders


class Remote:
    """An actor's method that answers with what stands in `answers`, one after the other."""

    def __init__(self, *answers: Orders) -> None:
        self.answers = list(answers)

    async def remote(self, *_: object) -> Orders:
        return self.answers.pop(0)


class Gang:
    killed = False

    def kill(self) -> None:
        self.killed = True


class Ended(Exception):
    pass


async def test_a_replica_that_was_given_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    register = Remote(Orders(), Orders(), Orders("5 canaries failed, one after the other"))

    async def find() -> Any:
        return type("Dispatcher", (), {"register": register})

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(engine_deployment, "find_dispatcher", find)
    monkeypatch.setattr(engine_deployment, "ANNOUNCE_SECONDS", 0.0)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.delattr(Replica, "__del__")
    replica = object.__new__(Replica)  # the constructor starts ranks
    replica._id, replica._info, replica._stopping = "r0", None, False  # type: ignore[assignment]
    gang = Gang()
    with pytest.raises(Ended):
        await replica._announce(gang)  # type: ignore[arg-type]
    assert gang.killed
    assert not register.answers
