"""What a start shows of its ranks: on a terminal a bar for each, elsewhere a line every few seconds. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from workers.api.replica import UP, Stage

LINE_SECONDS = 5.0
SAME_SECONDS = 20.0  # between two lines that differ in their time alone
MOST_SHOWN = 16  # ranks


@dataclass(frozen=True, slots=True)
class RankAt:
    """A rank of a replica, and what its start is at. `alone`: the replica has no other. A pipeline's has no name."""

    replica: str
    rank: int
    alone: bool
    stage: Stage

    @property
    def name(self) -> str:
        """For people, before what it is at."""
        if not self.replica:
            return ""
        return f"replica {self.replica}: " if self.alone else f"replica {self.replica} rank {self.rank}: "


class StartView(Protocol):
    """What a start tells. Any thread."""

    def say(self, text: str) -> None:
        """What is done now."""

    def show(self, ranks: Sequence[RankAt]) -> None:
        """How far all ranks are; about once a second."""


@contextmanager
def start_view(console: Console, say: Callable[[str], None]) -> Iterator[StartView]:
    """The view for `console`; without a terminal lines go to `say`."""
    if not console.is_terminal:
        yield Lines(say)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


class Bars:
    """On a terminal: what is done now, and below it the ranks."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._head = progress.add_task("starting", total=None, count="")
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """See `StartView`."""
        self._progress.update(self._head, description=f"{text} ...")

    def show(self, ranks: Sequence[RankAt]) -> None:
        """See `StartView`. Ranks that are gone, or too many, have no bar."""
        shown = {rank.name: rank.stage for rank in _most_wanted(ranks)[:MOST_SHOWN]}
        for name in self._tasks.keys() - shown.keys():
            self._progress.remove_task(self._tasks.pop(name))
        for name, stage in shown.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1, count="")
            done = stage.done if stage.total else int(stage == UP)
            text = f"  {name}{stage.name}"
            self._progress.update(
                self._tasks[name], description=text, completed=done, total=stage.total or 1, count=stage.count
            )


class Lines:
    """Elsewhere: a line when something else is done, and now and then one of the ranks that are not up."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._said = self._line = ""
        self._began = self._line_at = clock()

    def say(self, text: str) -> None:
        """See `StartView`. The same again is not said."""
        if text != self._said:
            self._said = text
            self._say(text)

    def show(self, ranks: Sequence[RankAt]) -> None:
        """See `StartView`."""
        now = self._clock()
        loading = [rank for rank in _most_wanted(ranks) if rank.stage != UP]
        if now - self._line_at < LINE_SECONDS or (ranks and not loading):
            return
        words = [f"{rank.name}{rank.stage}" for rank in loading[:MOST_SHOWN]]
        words += [f"and {len(loading) - MOST_SHOWN} more"] if len(loading) > MOST_SHOWN else []
        line = f"{len(ranks) - len(loading)} ranks up, {'; '.join(words)}" if ranks else "no rank yet"
        if line != self._line or now - self._line_at >= SAME_SECONDS:
            self._line, self._line_at = line, now
            self._say(f"  {now - self._began:.0f} s: {line}")


def _most_wanted(ranks: Sequence[RankAt]) -> list[RankAt]:
    """Those that are not up first, by name."""
    return sorted(ranks, key=lambda rank: (rank.stage == UP, rank.replica, rank.rank))
