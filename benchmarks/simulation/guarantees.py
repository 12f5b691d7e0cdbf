"""All that a simulation can show of `docs/qos.md`, by name, and the state of a sweep that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulation import cluster_fairness, fairness, isolation, work
from simulation.rows import Row


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run: `trials` of G2, `seconds` of G3; `quick` shortens the rest."""

    trials: int = 10_000
    seconds: float = 60.0
    processes: int = 1
    quick: bool = False
    state: Path | None = None  # where the sweep of G2 keeps what it has done


def swept(effort: Effort, tick: Callable[[], None]) -> dict[int, tuple[float, str]]:
    """The traces of G2 by seed, going on from `effort.state`."""
    known = read_state(effort.state)
    file = effort.state.open("a") if effort.state else None
    if file is not None and file.tell():
        file.write("\n")  # after a line that was cut short

    def tell(seed: int, part: float, wrong: str) -> None:
        known[seed] = (part, wrong)
        if file is not None:
            file.write(json.dumps([seed, part, wrong]) + "\n")
            file.flush()
        tick()

    try:
        fairness.sweep(effort.trials, processes=effort.processes, done=set(known), tell=tell)
    finally:
        if file is not None:
            file.close()
    return {seed: got for seed, got in known.items() if seed < effort.trials}


def read_state(path: Path | None) -> dict[int, tuple[float, str]]:
    """Seed -> (part of the bound, what went wrong)."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
    return {seed: (part, wrong) for seed, part, wrong in rows}


CHECKS: dict[str, Callable[[Effort, Callable[[], None]], Row]] = {
    "G1": lambda effort, tick: isolation.g1(),
    "G2": lambda effort, tick: fairness.g2(swept(effort, tick)),
    "G3": lambda effort, tick: fairness.g3(effort.seconds),
    "G4": lambda effort, tick: work.g4(1 if effort.quick else 6),
    "G5": lambda effort, tick: isolation.g5(),
    "G6": lambda effort, tick: cluster_fairness.g6(quick=effort.quick),
    "G8": lambda effort, tick: work.g8(2 if effort.quick else 20),
    "G9": lambda effort, tick: fairness.g9(),
    "G11": lambda effort, tick: cluster_fairness.g11(),
    "long_short": lambda effort, tick: work.long_short(),
    "kv_decode": lambda effort, tick: work.kv_decode(),
    "cached_hog": lambda effort, tick: work.cached_hog(),
    "slots": lambda effort, tick: cluster_fairness.slots(),
    "mixed": lambda effort, tick: work.mixed((20_000,) if effort.quick else (20_000, 60_000, 437_000)),
}


def checked(name: str, effort: Effort, tick: Callable[[], None]) -> Row:
    """The row called `name`; what a check asserts on its way makes a row that failed."""
    try:
        return CHECKS[name](effort, tick)
    except AssertionError as error:
        return Row(float("nan"), float("nan"), False, 1, str(error))
