"""Whom the watch of a start asks, and what it makes of ranks that end or do not answer. Ray is a fake.

Mutants seen to fail: ranks that were up asked again; a rank that has ended still shown; its death raised.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from cluster import start_watch
from cluster.start_view import RankAt
from workers.api.replica import UP, Stage


class FakeRay:
    """Named actors with stages; None: it does not answer, an exception: it ended."""

    def __init__(self) -> None:
        self.stages: dict[str, Any] = {}
        self.asked: list[str] = []
        self.util = SimpleNamespace(list_named_actors=self._list)

    def _list(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        return [{"name": name, "namespace": "serve"} for name in self.stages]

    def get_actor(self, name: str, namespace: str) -> Any:
        assert namespace == "serve"
        if self.stages[name] == "gone":
            raise ValueError(name)

        def ask() -> str:
            self.asked.append(name)
            return name

        return SimpleNamespace(stage=SimpleNamespace(remote=ask))

    def wait(self, answers: list[str], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[str], list[str]]:
        done = [a for a in answers if self.stages[a] is not None]
        return done, [a for a in answers if self.stages[a] is None]

    def get(self, answer: str) -> Any:
        if isinstance(self.stages[answer], Exception):
            raise self.stages[answer]
        return self.stages[answer]


def test_ranks_that_start_are_asked_and_those_that_are_up_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, ranks = FakeRay(), start_watch.Ranks()
    monkeypatch.setattr(start_watch, "ray", fake)
    assert ranks.look() == []
    loading, waiting = Stage("weights", 1, 2, "bytes"), Stage("starting")
    fake.stages = {"dispatcher": None, "rank-a-0": loading, "rank-b-0": UP, "rank-b-1": None, "rank-c-0": "gone"}

    def seen() -> dict[str, Stage]:
        return {rank.name: rank.stage for rank in ranks.look()}

    assert seen() == {"replica a: ": loading, "replica b rank 0: ": UP, "replica b rank 1: ": waiting}
    fake.asked.clear()
    fake.stages["rank-b-1"] = ray.exceptions.RayActorError()
    assert seen()["replica b rank 1: "] == waiting
    assert sorted(fake.asked) == ["rank-a-0", "rank-b-1"]
    fake.stages = {"rank-a-0": UP}
    assert ranks.look() == [RankAt("a", 0, True, UP)]
