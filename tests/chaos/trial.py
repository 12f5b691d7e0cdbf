"""One fault under load, from a whole cluster to the verdicts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from chaos.clients import Seen
from chaos.fault import Fault, Scene
from chaos.judge import Fate
from chaos.waiting import look, until

WHOLE_SECONDS = 180.0  # until the replicas that a fault needs are there
FLOW_SECONDS = 60.0  # until enough streams are in flight
NOTICE_SECONDS = 45.0
LOOK_SECONDS = 0.02


@dataclass(slots=True)
class Trial:
    """What came of it. Times in seconds; `failover` None: nothing was touched."""

    number: int
    fault: str
    victim: str = ""
    in_flight: int = 0  # streams in the middle of their answer, at the fault
    fronts: dict[str, int] = field(default_factory=dict)  # those accepted by then, by ingress, where one was asked for
    judged: int = 0  # requests that ended since the last trial, in flight at the fault or not
    fates: dict[str, int] = field(default_factory=dict)  # of those
    lost: int = 0  # of those: accepted, and not ended well, nor by a declared exception
    failover: float | None = None  # the longest pause that a client of a stream in flight saw
    accepted_after: float | None = None  # the longest that a request which came after the fault waited for its 200
    detection: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what may not be; empty = passed
    invalid: str = ""  # why it proves nothing

    @property
    def passed(self) -> bool:
        """A valid trial in which nothing was wrong."""
        return not self.invalid and not self.wrong

    def as_json(self) -> dict[str, Any]:
        """With times rounded to milliseconds."""
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


class Watch:
    """Requests that end while somebody listens."""

    def __init__(self) -> None:
        self._ended: list[Seen] = []

    def __call__(self, seen: Seen) -> None:
        self._ended.append(seen)

    def take(self) -> list[Seen]:
        """Those since the last call."""
        taken, self._ended = self._ended, []
        return taken


async def run_trial(number: int, fault: Fault, scene: Scene, watch: Watch, *, steady: bool) -> Trial:
    """`fault` happens to a cluster with enough replicas and streams. The gate is left open if `steady`.

    The trial ends when all streams that were in flight, and the requests that came in its first `hold` seconds if not
    `steady`, have ended.
    """
    trial = Trial(number, fault.name)
    if await until(lambda: len(scene.site.ready()) >= fault.needs, WHOLE_SECONDS) is None:
        trial.invalid = f"fewer than {fault.needs} replicas are ready"
        return trial
    scene.load.open()
    try:
        await _flowing(fault, scene)
        before = watch.take()
        try:
            await fault.inject(scene)
        except (LookupError, OSError) as e:
            trial.invalid = f"nothing was hit: {e}"
            count(trial, before)
            return trial
        trial.in_flight = sum(1 for s in scene.load.live if s.arrivals and s.arrivals[0] < fault.at)
        touched = [s for s in scene.load.live if s.accepted is not None and s.accepted < fault.at]
        noticing = asyncio.create_task(until(lambda: fault.noticed(scene.site), NOTICE_SECONDS, every=fault.look_every))
        await asyncio.sleep(max(fault.hold - (monotonic() - fault.at), 0.0))
        if not steady:
            scene.load.close()
        while any(s.ended is None for s in (touched if steady else scene.load.live)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        trial.detection = await noticing
        wrong = await fault.after(scene)
    finally:
        if fault.at:
            await fault.heal(scene)
    trial.victim, trial.figures = fault.victim, fault.figures
    count(trial, before)
    ended = watch.take()
    await _trace(fault, scene, touched, ended)
    judge_trial(trial, fault, touched, ended)
    if wrong:
        trial.wrong.append(wrong)
    return trial


async def _flowing(fault: Fault, scene: Scene) -> None:
    """Enough streams are in flight, or they will not be."""
    deadline = monotonic() + FLOW_SECONDS
    while len(scene.load.flowing) < max(fault.least, 1) and monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_SECONDS)
    await look(scene.site.ready)  # streams get a moment to spread


async def _trace(fault: Fault, scene: Scene, touched: Sequence[Seen], ended: Sequence[Seen]) -> None:
    """It is known at which ingress those were that ended badly, and the `touched`, where that decides."""
    bad = [s for s in ended if s.verdict is not None and s.verdict.fate not in (Fate.EXACT, Fate.REFUSED)]
    for seen in dict.fromkeys([*touched, *bad] if fault.whose else (s for s in bad if not fault.excuses(s))):
        await scene.load.client.trace(seen)


def count(trial: Trial, ended: Sequence[Seen], excused: Callable[[Seen], bool] = lambda seen: False) -> None:
    """Add the fates of requests that have ended, and what may not be."""
    for seen in ended:
        verdict = seen.verdict
        assert verdict is not None, "only requests that have ended are judged"
        trial.judged += 1
        trial.fates[verdict.fate] = trial.fates.get(verdict.fate, 0) + 1
        if verdict.fate not in (Fate.EXACT, Fate.REFUSED) and not excused(seen):
            trial.lost += verdict.fate.is_lost
            who = f"{seen.id} at {seen.front}" if seen.front else seen.id
            trial.wrong.append(f"{verdict.fate}: {who}: {verdict.seen}")


def judge_trial(trial: Trial, fault: Fault, touched: Sequence[Seen], ended: Sequence[Seen]) -> None:
    """Fill in what the clients saw: `touched` were accepted before the fault, `ended` are all that ended since."""
    count(trial, ended, fault.excuses)
    trial.fronts = dict(Counter(s.front for s in touched if s.front))
    streams = [s for s in touched if s.ask.stream]
    if streams:
        trial.failover = max(s.longest_pause(fault.at) for s in streams)
    waits = [s.accepted - s.began for s in ended if s.began > fault.at and s.accepted is not None and s.ask.stream]
    if waits:
        trial.accepted_after = max(waits)
    if trial.detection is None:
        trial.wrong.append(f"not noticed within {NOTICE_SECONDS:g} s")
    if trial.in_flight < fault.least:
        trial.invalid = f"only {trial.in_flight} streams in flight at the fault, not {fault.least}"
    else:
        trial.invalid = fault.void(touched)
