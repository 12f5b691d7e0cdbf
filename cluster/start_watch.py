"""Asks ranks that start how far they are, in a thread of its own: whoever starts them waits for an answer meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.gang import RANK_PREFIX
from cluster.start_view import RankAt
from workers.api.replica import UP, Stage

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 1.0

log = logging.getLogger("echelon.cluster")


@contextmanager
def watched_start(show: Callable[[Sequence[RankAt]], None]) -> Iterator[None]:
    """Meanwhile `show` is told of all ranks of the Ray cluster about once a second, once Ray is there."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop, show), daemon=True, name="start watch")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LOOK_SECONDS + ANSWER_SECONDS)


def _watch(stop: threading.Event, show: Callable[[Sequence[RankAt]], None]) -> None:
    ranks = Ranks()
    while not stop.wait(LOOK_SECONDS):
        try:
            if ray.is_initialized():
                show(ranks.look())
        except Exception:  # what is shown of a start must not end it; Ray may go while it is asked
            log.info("the start is not seen for a moment", exc_info=True)


class Ranks:
    """The ranks that live. One that was up is not asked again."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, Stage]] = {}

    def look(self) -> list[RankAt]:
        """How far each is; one that does not answer is where it was."""
        there = {a["name"]: a["namespace"] for a in ray.util.list_named_actors(all_namespaces=True)}
        self._known = {name: known for name, known in self._known.items() if name in there}
        for name in there.keys() - self._known.keys():
            if name.startswith(RANK_PREFIX):
                with suppress(ValueError):  # it has ended
                    self._known[name] = ray.get_actor(name, namespace=there[name]), Stage("starting")
        asked = {name: actor.stage.remote() for name, (actor, stage) in self._known.items() if stage != UP}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for name, answer in asked.items():
            actor, stage = self._known[name]
            self._known[name] = actor, _answered(answer) or stage
        return [self._at(name, stage) for name, (_, stage) in self._known.items()]

    def _at(self, name: str, stage: Stage) -> RankAt:
        replica, _, rank = name.removeprefix(RANK_PREFIX).rpartition("-")
        alone = f"{RANK_PREFIX}{replica}-1" not in self._known
        return RankAt(replica, int(rank), alone, stage)


def _answered(answer: Any) -> Stage | None:
    """None where it has not, or has ended."""
    if not ray.wait([answer], timeout=0)[0]:
        return None
    try:
        stage: Stage = ray.get(answer)
    except RayError:
        return None
    return stage
