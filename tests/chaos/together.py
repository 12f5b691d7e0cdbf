"""Runs of several clusters beside each other as one: trials, ledgers and all, in one file.

    PYTHONPATH=.:tests:benchmarks python -m chaos.together a.json b.json --out chaos.json

Exit status 1 if one of them failed, or came to no end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load.records import make_console

from chaos.report import Report, table
from chaos.trial import Trial


def together(runs: Sequence[dict[str, Any]]) -> Report:
    """One report of all; a run that was cut counts with the trials that it has."""
    shapes = [run["shape"] for run in runs]
    return Report(
        command=" & ".join(run["command"] for run in runs),
        seed=runs[0]["seed"],
        shape=shapes[0] if all(shape == shapes[0] for shape in shapes) else {"by run": shapes},
        trials=[Trial(**trial) for run in runs for trial in run["trials"]],
        ledgers=[f"seed {run['seed']}: {left}" for run in runs for left in run["ledgers"]],
        plain=[trial for run in runs for trial in run["plain_ray_serve"]],
        seconds=max(run["seconds"] for run in runs),
        finished=all(run["finished"] for run in runs),
    )


def main() -> None:
    """Read, join, write, show."""
    parser = argparse.ArgumentParser(prog="chaos.together", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    args = parser.parse_args()
    report = together([json.loads(path.read_text("utf-8")) for path in args.runs])
    report.write(args.out)
    console = make_console()
    console.print(table(report))
    for left in report.ledgers:
        console.print(left, style="red", markup=False)
    said = report.as_json()
    ends = "all finished" if report.finished else "not all finished"
    console.print(
        f"{len(args.runs)} runs, {ends}: {len(report.valid)} trials, {said['requests']} requests, "
        f"{said['lost']} lost, {said['inexact']} inexact"
    )
    sys.exit(report.failed or not report.finished)


if __name__ == "__main__":
    main()
