"""Faults with a seed, under load, for some minutes or so many trials. Exit status 1 if anything was lost or left over.

make chaos                                        # ten minutes, every kind of fault, chaos.json
make chaos ARGS='--minutes 30 --every 30'         # a soak: load without a break, a fault every 30 s
make chaos ARGS='--only "rank killed" --trials 200'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cluster.environment import prepare_ray

prepare_ray()

from load.records import make_console  # noqa: E402
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn  # noqa: E402

from chaos import processes  # noqa: E402
from chaos.cables import Cables  # noqa: E402
from chaos.clients import Client, Load  # noqa: E402
from chaos.fault import Fault, Scene  # noqa: E402
from chaos.faults_clients import CacheFull, ClientsAsleep, ClientsGone, Overload  # noqa: E402
from chaos.faults_front import (  # noqa: E402
    BadConfig,
    ClockJumped,
    DispatcherKilled,
    IngressKilled,
    ProxyKilled,
    set_clock,
)
from chaos.faults_host import HostKilled, LinkCut  # noqa: E402
from chaos.faults_replica import (  # noqa: E402
    FollowerKilled,
    FollowerStopped,
    GangKilled,
    HeadSilent,
    KilledUnderWhole,
    RankKilled,
    RankPaused,
    RankStarved,
    RankStopped,
    SupervisorKilled,
)
from chaos.ledgers import Baseline, sample_memory, settle, take_baseline  # noqa: E402
from chaos.oracle import Oracle, weights_digest  # noqa: E402
from chaos.plain_serve import beside  # noqa: E402
from chaos.processes import adopt_orphans  # noqa: E402
from chaos.report import Report, table  # noqa: E402
from chaos.site import Shape, Site, running  # noqa: E402
from chaos.trial import Watch, run_trial  # noqa: E402
from chaos.waiting import look, until  # noqa: E402

KINDS: tuple[type[Fault], ...] = (
    RankKilled,
    SupervisorKilled,
    GangKilled,
    RankStopped,
    RankPaused,
    KilledUnderWhole,
    DispatcherKilled,
    IngressKilled,
    ProxyKilled,
    CacheFull,
    ClientsGone,
    ClientsAsleep,
    BadConfig,
    RankStarved,
    HeadSilent,
    Overload,
)
HOST_KINDS: tuple[type[Fault], ...] = (LinkCut, HostKilled)
GANG_KINDS: tuple[type[Fault], ...] = (FollowerKilled, FollowerStopped)
AGAIN = 3  # tries of a trial that was invalid
MEMORY_SECONDS = 10.0
WARM_SECONDS = 5.0
READY_SECONDS = 240.0
WALL_CLOCK = Path(__file__).with_name("wall_clock.c")


def faults(kinds: list[type[Fault]], seed: int) -> Iterator[type[Fault]]:
    """Without end: all kinds in an order of their own, again and again."""
    rng = random.Random(seed)
    for _ in itertools.count():
        yield from rng.sample(kinds, len(kinds))


class Bench:
    """One run."""

    def __init__(self, args: argparse.Namespace, site: Site, report: Report, bar: Progress) -> None:
        self._args, self._site, self._report, self._bar = args, site, report, bar
        self._oracle = Oracle()
        self._watch = Watch()
        self._load = Load(
            Client(site.host, site.port, site.model),
            self._oracle,
            seed=args.seed,
            streams=args.streams,
            tokens=(args.tokens // 2, args.tokens),
            ended=self._watch,
        )
        self._began = 0.0

    async def run(self, kinds: list[type[Fault]]) -> None:
        """Warm up, take the baseline, inject, settle; the report is written after each trial."""
        args, report = self._args, self._report
        if weights_digest() != self._oracle.weights:
            raise SystemExit("the oracle is of another demo model: python -m chaos.oracle")
        self._load.start()
        await self._warm_up()
        baseline = await look(lambda: take_baseline(self._site))
        memory = asyncio.create_task(sample_memory(report.memory, MEMORY_SECONDS))
        self._began = time.monotonic()
        task = self._bar.add_task("", total=args.trials or 60 * args.minutes, said="")
        for number, kind in enumerate(faults(kinds, args.seed)):
            if self._over(number):
                break
            if args.every:
                await asyncio.sleep(max(number * args.every - self._seconds, 0.0))
            await self._trial(number, kind, task)
        self._load.close()
        if args.plain:
            report.plain += await beside(self._site.host, self._site.port, args.plain, args.seed, self._say)
        report.ledgers += await self._settled(baseline)
        memory.cancel()
        await self._load.stop()
        report.seconds, report.finished = self._seconds, True

    def _say(self, text: str) -> None:
        self._bar.update(self._bar.tasks[0].id, said=text)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _over(self, number: int) -> bool:
        return number >= self._args.trials if self._args.trials else self._seconds > 60 * self._args.minutes

    async def _trial(self, number: int, kind: type[Fault], task: TaskID) -> None:
        report = self._report
        for again in range(AGAIN):
            rng = random.Random(f"{self._args.seed}/{number}/{again}")
            scene = Scene(self._site, self._load, self._oracle, rng)
            trial = await run_trial(number, kind(), scene, self._watch, steady=bool(self._args.every))
            report.trials.append(trial)
            report.seconds = self._seconds
            report.write(self._args.out)
            for wrong in trial.wrong[:3]:
                self._bar.console.print(f"trial {number}, {trial.fault}: {wrong}", style="red", markup=False)
            if not trial.invalid:
                break
        wrong = sum(bool(t.wrong) for t in report.trials)
        done = number + 1 if self._args.trials else self._seconds
        pause = "" if trial.failover is None else f", {trial.failover:.2f} s"
        said = f"{len(report.valid)} trials, {wrong} with losses; {trial.fault}{pause}"
        self._bar.update(task, completed=done, said=said)

    async def _warm_up(self) -> None:
        """Some seconds of load that must be exact."""
        self._load.open()
        await asyncio.sleep(WARM_SECONDS)
        self._load.close()
        while self._load.live:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        wrong = [s.verdict for s in self._watch.take() if s.verdict is None or s.verdict.fate != "exact"]
        if wrong:
            raise SystemExit(f"without any fault: {wrong[0]}")

    async def _settled(self, baseline: Baseline) -> list[str]:
        while self._load.live:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if await until(lambda: len(self._site.ready()) >= self._site.shape.replicas, READY_SECONDS, every=0.5) is None:
            return ["the replicas did not come back"]
        late = [s.verdict for s in self._watch.take() if s.verdict is None or s.verdict.fate != "exact"]
        return [f"after the last trial: {v}" for v in late] + await settle(self._site, baseline)


@contextlib.contextmanager
def clock_in(folder: Path, *, jumps: bool) -> Iterator[None]:
    """What starts in the block takes its wall clock from a file in `folder`, where it `jumps`."""
    if jumps:
        library = folder / "wall_clock.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, WALL_CLOCK], check=True)
        ClockJumped.file = folder / "clock"
        set_clock(ClockJumped.file, 0)
        os.environ |= {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(ClockJumped.file)}
    yield
    os.environ.pop("LD_PRELOAD", None)


def main() -> None:
    """Parse the command line, run, show."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=0.0, help="seconds between faults; 0: as soon as possible")
    parser.add_argument("--trials", type=int, default=0, help="so many, instead of minutes")
    parser.add_argument("--only", default="", help="names of faults, with commas between")
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=300, help="of an answer, at most")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument(
        "--tp", type=int, default=1, help="ranks of a replica; from two on one that follows is hit, too"
    )
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="logical ones: twice as many as there are, and two gangs share each")
    parser.add_argument("--plain", type=int, default=0, help="then so many trials of each kind on Ray Serve alone")
    parser.add_argument("--clock", action="store_true", help="the wall clock jumps, too (needs a C compiler)")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    parser.add_argument("--join", help=argparse.SUPPRESS)  # these three are for chaos.hosts_run
    parser.add_argument("--cables", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hosts", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = {kind.name: kind for kind in (KINDS if args.join is None else (*KINDS[:5], *HOST_KINDS))}
    if args.tp > 1:
        known |= {kind.name: kind for kind in GANG_KINDS}
    if args.clock:
        known[ClockJumped.name] = ClockJumped
    if args.join is not None:
        processes.ROOT = 1  # this host's processes are all of the cluster
        LinkCut.cables = HostKilled.cables = Cables(args.cables)
        LinkCut.names = HostKilled.names = dict(pair.split("=") for pair in args.hosts.split(","))
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown faults {unknown}; there are: {', '.join(known)}")
    shape = Shape(replicas=args.replicas, tensor_parallel=args.tp, ingresses=args.ingresses, gpus=args.gpus)
    report = Report(" ".join(["python -m chaos", *sys.argv[1:]]), args.seed, asdict(shape))
    console = make_console()
    adopt_orphans()
    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[said]}")
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            clock_in(Path(folder), jumps=args.clock),
            running(shape, Path(folder), console.print, address=args.join) as site,
            Progress(*columns, console=console) as bar,
        ):
            asyncio.run(Bench(args, site, report, bar).run([known[name] for name in names]))
    finally:
        report.write(args.out)
    console.print(table(report))
    for left in report.ledgers:
        console.print(left, style="red", markup=False)
    console.print(f"{args.out}: {'FAILED' if report.failed else 'nothing lost, nothing repeated, nothing left over'}")
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
