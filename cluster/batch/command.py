"""`echelon batch`: a job with its progress bar, and what is said when it stops."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.batch.job import BatchJob, Retry
from cluster.batch.journal import Journal
from cluster.batch.lines import Record, read_lines
from cluster.batch.transport import HttpTransport, RayTransport, Transport
from cluster.client import connect
from cluster.environment import api_key
from cluster.http_client import Server, Unreachable
from workers.api.errors import ConfigError

STOPPED = 130  # exit status after Ctrl-C, as a shell has it


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What the command line says. Seconds and counts."""

    source: Path
    target: Path
    url: str
    address: str | None = None  # of a Ray cluster; then the lines go by Ray handles, and `url` is not used
    model: str | None = None  # for lines that name none
    concurrency: int = 64
    patience: float = 600.0
    timeout: float = 600.0


def run_batch(options: BatchOptions) -> int:
    """The exit status: 0 when every line is in the target, 130 after Ctrl-C. Raises EchelonError."""
    console = Console(stderr=True, highlight=False)
    total = _count(options.source)
    if options.target.exists() and options.target.samefile(options.source):
        raise ConfigError(f"{options.target} is the input: name another file for the output")
    transport = _transport(options)
    models = transport.models()  # a wrong URL shows here, not in every line
    journal = Journal(options.target)
    try:
        job = BatchJob(transport, journal, concurrency=options.concurrency, retry=Retry(options.patience))
        before = len(journal.done)
        if journal.torn:
            console.print("the last line of the output was torn: it is cut off and its line is run again")
        if before:
            console.print(f"{before} lines are in {options.target} already")
        finished = _run(job, journal, console, options, total, models[0])
        now = len(journal.done) - before
        console.print(f"{now} lines run now, {before} before, {journal.failed} of them failed", soft_wrap=True)
        if finished and before > job.skipped:
            console.print(f"{before - job.skipped} lines of the output belong to no line of the input", style="yellow")
    except Unreachable as e:
        raise Unreachable(f"{e}\n{len(journal.done)} of {total} lines are done; run the same command to go on") from e
    finally:
        transport.close()
        journal.close()
    if not finished:
        console.print(f"stopped with {len(journal.done)} of {total} lines done; run the same command to go on")
        return STOPPED
    return 0


def _run(
    job: BatchJob, journal: Journal, console: Console, options: BatchOptions, total: int, default_model: str
) -> bool:
    with _progress(console) as progress, options.source.open("rb") as source, _stopped_by_signals(job):
        task = progress.add_task(options.source.name, total=total, completed=len(journal.done), failed=0, rate=0.0)
        return job.run(read_lines(source, options.model or default_model), _Counter(progress, task, journal))


class _Counter:
    """Moves the bar: lines, failures, and tokens a second since the start."""

    def __init__(self, progress: Progress, task: TaskID, journal: Journal) -> None:
        self._progress, self._task, self._journal = progress, task, journal
        self._started, self._tokens = time.monotonic(), 0

    def __call__(self, record: Record) -> None:
        self._tokens += record.tokens
        rate = self._tokens / max(time.monotonic() - self._started, 1e-3)
        self._progress.update(self._task, advance=1, failed=self._journal.failed, rate=rate)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _stopped_by_signals(job: BatchJob) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) stops the job between two lines; a second one ends the process as usual."""
    before: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        job.stop()
        for n, handler in before.items():
            signal.signal(n, handler)

    for caught in (signal.SIGINT, signal.SIGTERM):
        before[caught] = signal.signal(caught, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _transport(options: BatchOptions) -> Transport:
    if options.address is not None:
        return RayTransport(connect(options.address), options.timeout)
    return HttpTransport(Server.parse(options.url, api_key()), options.timeout)


def _count(source: Path) -> int:
    """Lines of the input that are not blank. Raises ConfigError."""
    try:
        with source.open("rb") as f:
            return sum(1 for raw in f if raw.strip())
    except OSError as e:
        raise ConfigError(f"cannot read {source}: {e.strerror}") from e
