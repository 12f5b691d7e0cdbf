"""The figures of `simulate.py suites` as PNGs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from simulation.isolation import TAU
from simulation.suites import POLICIES, SECONDS, Result, Suite

_INK = {"one": "#1b6ca8", "two": "#d1495b", "three": "#66a182", "four": "#edae49"}


def draw_suites(suites: Sequence[Suite], results: Mapping[str, Sequence[Result]], folder: Path) -> None:
    """One row a suite, one column a policy: service of each client in the last seconds, over time."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [s for s in suites if len(s.quotas) <= len(_INK)]
    figure, axes = plt.subplots(
        len(rows), len(POLICIES), figsize=(11, 1.75 * len(rows)), sharex=True, sharey="row", squeeze=False
    )
    for axis, policy in zip(axes[0], POLICIES, strict=True):
        axis.set_title(policy, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=8)
    for row, suite in zip(axes, rows, strict=True):
        for axis, result in zip(row, results[suite.name], strict=True):
            for user in suite.quotas:
                times, rates = rate(result.rows, user)
                axis.plot(times, rates, color=_INK[user], linewidth=1.1, label=user)
            axis.set_xlim(0, SECONDS)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(f"{suite.name}\nunits / s", fontsize=8)
        row[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    figure.suptitle("Service of each client (1 a prompt token, 2 an answer token), mean over 30 s", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(folder / "qos-suites.png", dpi=110)
    plt.close(figure)


def rate(
    rows: Sequence[tuple[float, Mapping[str, float]]], user: str, *, over: int = 6
) -> tuple[list[float], list[float]]:
    """Service a second over the last `over` samples."""
    times, rates = [], []
    for (before, old), (now, new) in zip(rows, rows[over:], strict=False):
        times.append(now)
        rates.append((new.get(user, 0.0) - old.get(user, 0.0)) / (now - before))
    return times, rates


def draw_frontier(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Throughput over the upper tier's ITL, a curve for each flood, a point for each tau."""
    folder.mkdir(parents=True, exist_ok=True)
    by_flood: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_flood[row["flood"]].append(row)
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for (name, points), color, above in zip(by_flood.items(), ("#1b6ca8", "#d1495b"), (False, True), strict=True):
        itl = [1e3 * p["itl"] for p in points]
        speed = [p["speed"] for p in points]
        axis.plot(itl, speed, "o-", color=color, markersize=4, label=f"flood of {name}")
        for place, taus in _labels(points).items():
            text = f"{taus[0]:g} ms" if len(taus) == 1 else f"{taus[0]:g} to {taus[-1]:g} ms"
            left = above and len(taus) == 1
            axis.annotate(
                text, place, fontsize=7, ha="right" if left else "left",
                xytext=(-5, -2) if left else (7, -2) if above else (3, -9), textcoords="offset points",
            )  # fmt: skip
        default = next(p for p in points if p["tau"] == TAU)
        axis.plot([1e3 * default["itl"]], [default["speed"]], "o", color=color, markersize=9, fillstyle="none")
    axis.set_xlim(left=0)
    axis.axvline(25.0, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_xlabel("ITL of the upper tier, p99, ms (dashed: 25 ms)")
    axis.set_ylabel("throughput / first come, first served")
    axis.set_title(f"What tau buys: points are values of tau, ringed the default of {1e3 * TAU:g} ms", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(folder / "qos-tau.png", dpi=120)
    plt.close(figure)


def _labels(points: Sequence[Mapping[str, Any]]) -> dict[tuple[float, float], list[float]]:
    """Where points lie (ms of ITL, throughput), with the values of tau, in ms, of those that lie there too closely."""
    labels: dict[tuple[float, float], list[float]] = {}
    last = (float("-inf"), 0.0)
    for point in points:
        place = (1e3 * point["itl"], point["speed"])
        if abs(place[0] - last[0]) > 1.5:
            labels[last := place] = []
        labels[last].append(1e3 * point["tau"])
    return labels
