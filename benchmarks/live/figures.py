"""Medians with their 95 % intervals, and the rows of what was measured beside what is allowed."""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from load.records import versions

_RESAMPLES = 2000


def interval(
    values: Sequence[float], of: Callable[[Sequence[float]], float] = statistics.median
) -> tuple[float, float, float]:
    """(`of` all values, the ends of its 95 % interval) by a bootstrap; the same for the same values."""
    rng = random.Random(1)
    found = sorted(of(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return of(values), found[_RESAMPLES // 40], found[-_RESAMPLES // 40 - 1]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `bound`: what it may be; `most`: it is an upper one. It counts as missed only where the
    interval [`low`, `high`] excludes it; without an interval both are the figure.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str = ""
    bound: float | None = None
    most: bool = True
    values: tuple[float, ...] = field(default=(), repr=False)

    @property
    def missed(self) -> bool:
        """Whether the bound is outside of what the figure may be."""
        if self.bound is None:
            return False
        return self.low > self.bound if self.most else self.high < self.bound


def median(
    name: str, values: Sequence[float], unit: str = "", bound: float | None = None, *, most: bool = True
) -> Figure:
    """The median of `values` with its interval."""
    return Figure(name, *interval(values), unit, bound, most, tuple(values))


def apart(
    name: str, ours: Sequence[float], theirs: Sequence[float], unit: str = "", bound: float | None = None
) -> Figure:
    """How far the means of two samples lie apart, whichever is the greater, with the interval of that."""
    rng = random.Random(1)
    found = sorted(
        statistics.fmean(rng.choices(ours, k=len(ours))) - statistics.fmean(rng.choices(theirs, k=len(theirs)))
        for _ in range(_RESAMPLES)
    )
    low, high = found[_RESAMPLES // 40], found[-_RESAMPLES // 40 - 1]
    least = 0.0 if low <= 0.0 <= high else min(abs(low), abs(high))
    value = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    return Figure(name, value, least, max(abs(low), abs(high)), unit, bound)


def single(name: str, value: float, unit: str = "", bound: float | None = None, *, most: bool = True) -> Figure:
    """A count, or what was seen once."""
    return Figure(name, value, value, value, unit, bound, most)


def show(part: str, figures: Sequence[Figure]) -> None:
    """One line a figure."""
    for f in figures:
        bound = "" if f.bound is None else f"; {'at most' if f.most else 'at least'} {f.bound:.4g} {f.unit}"
        ends = "" if f.low == f.high == f.value else f" [{f.low:.4g}, {f.high:.4g}]"
        spread = f", {min(f.values):.4g}..{max(f.values):.4g}, n={len(f.values)}" if f.values else ""
        print(
            f"{part} {f.name}: {f.value:.4g} {f.unit}{ends}{bound}{' MISSED' if f.missed else ''}{spread}", flush=True
        )


def write(file: Path, found: Mapping[str, Sequence[Figure]], *, machine: Mapping[str, Any] | None = None) -> None:
    """All of it by part, values too, with the command and the versions; `machine`: what more is known of it."""
    parts = {part: [{**asdict(f), "missed": f.missed} for f in figures] for part, figures in found.items()}
    document = {
        "command": " ".join(sys.argv),
        "versions": versions(),
        "machine": machine or platform.machine(),
        "figures": parts,
    }
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
