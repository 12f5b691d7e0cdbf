"""What came back, by request, and the figures made of it.

FTL: first-token latency, from sending a request to its first token. TPOT: time per output token after the first, a mean
by request. ITL: the gap between two arrivals of tokens (an arrival may carry several).
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import workloads
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PERCENTILES = (50, 75, 95, 99)
PACKAGES = ("echelon", "torch", "triton", "transformers", "ray")


@dataclass(slots=True)
class Record:
    """One request. Times in seconds of `time.perf_counter`; `tokens` as the target counted them."""

    prompt_tokens: int
    began: float = 0.0
    times: list[float] = field(default_factory=list)  # of each arrival of tokens
    tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """All requests of one repeat, and the seconds from the first one sent to the last token."""

    records: list[Record]
    seconds: float


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation; 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(run: Run) -> dict[str, float]:
    """Milliseconds, tokens and requests a second of one run. Failed requests count in `failed` alone."""
    good = [r for r in run.records if not r.error]
    ftl = [1e3 * (r.times[0] - r.began) for r in good if r.times]
    tpot = [1e3 * (r.times[-1] - r.times[0]) / (r.tokens - 1) for r in good if r.times and r.tokens > 1]
    itl = [1e3 * (b - a) for r in good for a, b in pairwise(r.times)]
    out, given = sum(r.tokens for r in good), sum(r.prompt_tokens for r in good)
    return {
        "requests_per_s": len(good) / run.seconds,
        "output_tok_per_s": out / run.seconds,
        "input_tok_per_s": given / run.seconds,
        "total_tok_per_s": (given + out) / run.seconds,
        "ftl_ms_min": min(ftl, default=0.0),
        "ftl_ms_mean": sum(ftl) / max(len(ftl), 1),
        "ftl_ms_max": max(ftl, default=0.0),
        **{f"ftl_ms_p{p}": percentile(ftl, p) for p in PERCENTILES},
        "tpot_ms_mean": sum(tpot) / max(len(tpot), 1),
        **{f"itl_ms_p{p}": percentile(itl, p) for p in PERCENTILES},
        "failed": float(len(run.records) - len(good)),
        "cached_tokens": float(sum(r.cached_tokens for r in good)),
    }


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Median, least, greatest and count of every figure over the repeats."""
    each = [figures(run) for run in runs]
    return {name: workloads.spread([f[name] for f in each]) for name in each[0]}


def show(rows: Sequence[tuple[str, dict[str, dict[str, float]]]], names: Sequence[str], console: Console) -> None:
    """A table with one row a measurement: medians, with least and greatest under them."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_per_s", "/s").replace("_", " "), justify="right")
    for title, row in rows:
        cells = [_cell(name, row[name]) for name in names]
        table.add_row(title, *cells)
    console.print(table)


def _cell(name: str, value: dict[str, float]) -> str:
    if name.split("_", maxsplit=1)[0] in ("ftl", "tpot", "itl") and not value["max"]:
        return "not seen"
    return f"{value['median']:,.4g}\n[dim]{value['min']:,.4g} to {value['max']:,.4g}[/dim]"


def complain(runs: Sequence[Run]) -> None:
    """Raises SystemExit with the first reason where requests failed: figures of a failing target mean nothing."""
    errors = [r.error for run in runs for r in run.records if r.error]
    if errors:
        asked = sum(len(run.records) for run in runs)
        raise SystemExit(f"{len(errors)} of {asked} requests failed, the first: {errors[0]}")


def make_console() -> Console:
    """Wide enough for the tables where nobody watches."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def progress_bar(console: Console) -> Progress:
    """The bar that all of these programs draw."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(path: Path, *, machine: dict[str, Any], rows: dict[str, Sequence[Run]], more: dict[str, Any]) -> None:
    """A JSON file with everything: the command, versions, machine, figures, and the runs by request."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "machine": machine,
        **more,
        "figures": {name: summary(runs) for name, runs in rows.items()},
        "runs": {name: [_rounded(run) for run in runs] for name, runs in rows.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _rounded(run: Run) -> dict[str, Any]:
    def since(record: Record) -> Callable[[float], float]:
        return lambda at: round(at - record.began, 6)

    records = [{**asdict(r), "began": 0.0, "times": list(map(since(r), r.times))} for r in run.records]
    return {"seconds": run.seconds, "records": [{k: v for k, v in r.items() if k != "began"} for r in records]}
