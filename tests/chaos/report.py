"""What a run came to: by fault, in a file that is whole after every trial, and as a table. Pure but for the file."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load.records import percentile, versions
from rich.table import Table

from chaos.judge import Fate
from chaos.trial import Trial

SURE = 3.0  # 0 of N is less than 3/N, at 95 %


@dataclass(slots=True)
class Report:
    """Everything that is known so far."""

    command: str
    seed: int
    shape: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    ledgers: list[str] = field(default_factory=list)  # what is open or grown at the end; empty = nothing
    memory: list[dict[str, float]] = field(default_factory=list)  # samples: seconds, resident bytes by role
    plain: list[dict[str, Any]] = field(default_factory=list)  # Ray Serve alone, beside
    seconds: float = 0.0
    finished: bool = False

    @property
    def valid(self) -> list[Trial]:
        """Trials with enough streams in flight."""
        return [t for t in self.trials if not t.invalid]

    @property
    def failed(self) -> bool:
        """Whether something was lost, inexact or left behind, or nothing was tried."""
        return bool(self.ledgers or not self.valid or any(t.wrong for t in self.trials))

    def as_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "command": self.command,
            "seed": self.seed,
            "machine": {"cores": os.cpu_count(), "kernel": platform.release(), **versions()},
            "shape": self.shape,
            "finished": self.finished,
            "seconds": round(self.seconds, 1),
            "passed": not self.failed,
            "requests": sum(t.judged for t in self.trials),
            "lost": sum(t.lost for t in self.trials),
            "duplicated": sum(t.fates.get(Fate.REPEATED, 0) for t in self.trials),
            "inexact": sum(n for t in self.trials for f, n in t.fates.items() if Fate(f).is_inexact),
            "by_fault": summary(self.trials),
            "ledgers": self.ledgers,
            "memory": self.memory,
            "plain_ray_serve": self.plain,
            "trials": [t.as_json() for t in self.trials],
        }

    def write(self, path: Path) -> None:
        """The file is whole at any time: it is replaced at once."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        new.replace(path)


def summary(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """By fault: valid trials, fates, and the times of the worst stream of each trial."""
    out: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(t.fault for t in trials):
        of = [t for t in trials if t.fault == name]
        valid = [t for t in of if not t.invalid]
        fates: Counter[str] = Counter()
        for trial in valid:
            fates.update(trial.fates)
        row: dict[str, Any] = {
            "trials": len(valid),
            "invalid": len(of) - len(valid),
            "failed": sum(bool(t.wrong) for t in valid),
            "in_flight": sum(t.in_flight for t in valid),
            "fates": dict(fates),
            "lost_below": round(SURE / len(valid), 4) if valid else None,
            "failover": spread([t.failover for t in valid]),
            "accepted_after": spread([t.accepted_after for t in valid]),
            "detection": spread([t.detection for t in valid]),
        }
        for figure in sorted({f for t in valid for f in t.figures}):
            row[figure] = spread([t.figures.get(figure) for t in valid])
        out[name] = row
    return out


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """p50, p99, least and greatest of those that are known; None where none is."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    found = {"p50": percentile(known, 50), "p99": percentile(known, 99), "min": min(known), "max": max(known)}
    return {k: round(v, 3) for k, v in found.items()} | {"n": len(known)}


def table(report: Report) -> Table:
    """By fault: trials, streams, what became of them, and seconds as p50, p99 and greatest."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column("fault")
    for name in ("trials", "failed", "in flight", "exact", "else", "pause", "accepted after", "noticed after"):
        made.add_column(name, justify="right")
    for name, row in summary(report.trials).items():
        others = {f: n for f, n in row["fates"].items() if f != Fate.EXACT}
        made.add_row(
            name,
            f"{row['trials']}" + (f" (+{row['invalid']} invalid)" if row["invalid"] else ""),
            str(row["failed"]),
            str(row["in_flight"]),
            str(row["fates"].get(Fate.EXACT, 0)),
            ", ".join(f"{n} {f}" for f, n in others.items()) or "-",
            *(_cell(row[key]) for key in ("failover", "accepted_after", "detection")),
        )
    return made


def _cell(values: dict[str, float] | None) -> str:
    return "-" if values is None else f"{values['p50']:.2f} / {values['p99']:.2f} / {values['max']:.2f}"
