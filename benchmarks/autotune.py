"""The tuning table of this type of GPU: times what may be fastest at every entry and writes the best down.

    python benchmarks/autotune.py --out kernels/tables/h100.json
    python benchmarks/autotune.py --out /tmp/some.json --only "8B" --budget 60

Every candidate runs from a CUDA graph over memory that is not in the L2 cache, and is compared with the reference in
fp32. Candidates are tried in rounds, the most promising of all entries first; no round starts a new entry after
--budget seconds. The file is written after every entry: whenever it ends, the table is whole, with defaults where
nothing was tried. An entry leaves its default only for what is 2 % faster. Figures are medians of a launch. At the end
prefill attention is compared with torch's own (`torch_attention.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch_attention
import triton
from ceilings import measure as measure_ceilings
from tuning_cases import Arena, Case
from tuning_entries import Entry, all_entries, as_json

DEVICE = torch.device("cuda")
ROUND = 6  # candidates of an entry
GAIN = 0.98  # of the default's time, from which on a candidate replaces it
REPLAYS = 10
ARENA_ELEMENTS = 1 << 30

# Seconds of a launch with a tuning, and the output of the case's last one.
Measure = Callable[[Case, Any], tuple[float, torch.Tensor]]


@dataclass(slots=True)
class Found:
    """What is known of an entry: seconds of each case by tuning, and why other tunings were left out."""

    names: list[str] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    tried: dict[Any, list[float]] = field(default_factory=dict)
    skipped: dict[Any, str] = field(default_factory=dict)

    def ratio(self, tuning: Any, to: Any) -> float:
        """Geometric mean over the cases of the times of two tunings."""
        pairs = zip(self.tried[tuning], self.tried[to], strict=True)
        return math.exp(statistics.fmean(math.log(a / b) for a, b in pairs))

    def best(self, default: Any) -> Any:
        """What the table should say."""
        if default not in self.tried:
            return default
        ranked = min(self.tried, key=lambda tuning: self.ratio(tuning, default))
        return ranked if self.ratio(ranked, default) <= GAIN else default


def replayed(case: Case, tuning: Any) -> tuple[float, torch.Tensor]:
    """By events around replays of one graph of all launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for launch in case.launches:
            out = launch(tuning)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(case.launches))
    return statistics.median(times[2:]), out.clone()


def compiled(cases: Sequence[Case], tunings: Sequence[Any]) -> dict[Any, str]:
    """Launch each once, many beside each other, so that all are compiled; the first line of what failed, by tuning."""
    on_gpu = torch.cuda.is_available()

    def attempt(job: tuple[Any, Case]) -> str:
        tuning, case = job
        try:
            case.launches[0](tuning)
        except Exception as error:  # the compiler's and the driver's have no common class
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return ""

    jobs = [(tuning, case) for tuning in tunings for case in cases]
    # A thread must have used the device before it loads a kernel. Triton's interpreter is for one thread.
    threads, begin = (min(12, os.cpu_count() or 1), torch.cuda.synchronize) if on_gpu else (1, None)
    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        whys = list(pool.map(attempt, jobs))
    if on_gpu:
        torch.cuda.synchronize()  # a fault of the device ends the run here
    return {tuning: why for (tuning, _), why in zip(jobs, whys, strict=True) if why}


def try_some(entry: Entry, found: Found, tunings: tuple[Any, ...], arena: Arena, measure: Measure) -> None:
    """Time `tunings` at all cases of an entry. Raises RuntimeError where the default does not run or is wrong."""
    cases = entry.cases(arena)
    found.names, found.work = [case.name for case in cases], [case.work for case in cases]
    failed = compiled(cases, tunings)
    for tuning in tunings:
        if tuning in failed:
            found.skipped[tuning] = failed[tuning]
            continue
        times = []
        for case in cases:
            seconds, out = measure(case, tuning)
            try:
                case.check(out)
            except AssertionError as error:
                found.skipped[tuning] = f"wrong at {case.name}: {' '.join(str(error).split())[:160]}"
                break
            times.append(seconds)
        else:
            found.tried[tuning] = times
    if entry.default in found.skipped:
        raise RuntimeError(f"{entry.label}: the default fails: {found.skipped[entry.default]}")


def table_of(entries: list[Entry], found: list[Found], about: dict[str, Any]) -> dict[str, Any]:
    """The table as JSON, whole at any time."""
    table: dict[str, Any] = {**about, "decode": {}, "prefill": {}, "gemv": {}}
    for entry, one in zip(entries, found, strict=True):
        best = one.best(entry.default)
        step: dict[str, Any] = {"tuning": as_json(best)}
        if best in one.tried:
            times = zip(one.names, one.tried[best], one.tried[entry.default], strict=True)
            step["microseconds"] = {name: [round(1e6 * s, 2) for s in pair] for name, *pair in times}
        if entry.operation == "gemv":
            table["gemv"][tuple(entry.key.values())] = {**entry.key, **step}
        else:
            place = table[entry.operation].setdefault(tuple(entry.key.values()), {**entry.key, "steps": []})
            place["steps"].append({"below": entry.below, **step})
    for operation in ("decode", "prefill", "gemv"):
        table[operation] = list(table[operation].values())
        for one in table[operation]:
            if "steps" in one:
                one["steps"].sort(key=lambda step: math.inf if step["below"] is None else step["below"])
    return table


def render(value: Any, depth: int = 0) -> str:
    """JSON with a line for each step, and for what holds nothing but numbers and words."""
    parts_of = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth == 4 or not any(isinstance(part, dict | list) for part in parts_of):
        return json.dumps(value)
    if isinstance(value, dict):
        begin, end = "{", "}"
        parts = [f"{json.dumps(name)}: {render(part, depth + 1)}" for name, part in value.items()]
    else:
        begin, end = "[", "]"
        parts = [render(part, depth + 1) for part in value]
    lead = "\n" + " " * (depth + 1)
    return begin + lead + f",{lead}".join(parts) + lead[:-1] + end


def rate(entry: Entry, work: float, seconds: float) -> str:
    """Of one launch."""
    scale, unit = (1e12, "TFLOP/s") if entry.operation == "prefill" else (1e9, "GB/s")
    return f"{1e6 * seconds:.1f} us ({work / seconds / scale:.0f} {unit})"


def report(entry: Entry, found: Found, most: int) -> None:
    """Print the best tunings of an entry, its default, and what was skipped."""
    best = found.best(entry.default)
    ranked = sorted(found.tried, key=lambda tuning: found.ratio(tuning, entry.default))
    print(f"{entry.label}: {', '.join(found.names)}")
    for tuning in [*ranked[:most], *(one for one in ranked[most:] if one == entry.default)]:
        figures = ", ".join(rate(entry, *pair) for pair in zip(found.work, found.tried[tuning], strict=True))
        mark = ("*" if tuning == best else " ") + ("d" if tuning == entry.default else " ")
        print(f"  {mark} {found.ratio(tuning, entry.default):.3f}  {figures}  {tuning}")
    for tuning, why in found.skipped.items():
        print(f"     skipped {tuning}: {why}", flush=True)


def search(
    entries: list[Entry],
    arena: Arena,
    measure: Measure,
    write: Callable[[list[Found]], None],
    over: Callable[[], bool],
) -> list[Found]:
    """Try the candidates of all entries in rounds until none are left or it is `over`."""
    found = [Found() for _ in entries]
    for entry in {entry.operation: entry for entry in reversed(entries)}.values():
        entry.cases(arena)[0].launches[0](entry.default)  # alone: it sets up what threads then share
    for begin in range(0, max(len(entry.candidates) for entry in entries), ROUND):
        for entry, one in zip(entries, found, strict=True):
            tunings = entry.candidates[begin : begin + ROUND]
            if over():
                return found
            if tunings:
                try_some(entry, one, tunings, arena, measure)
                write(found)
                report(entry, one, most=3)
    return found


def summarize(entries: list[Entry], found: list[Found]) -> None:
    """Print what each entry gained."""
    print("\nbest against default, by case:")
    for entry, one in zip(entries, found, strict=True):
        if not one.tried:
            print(f"  {entry.label}: not tried, so the default")
            continue
        best = one.best(entry.default)
        for name, work, mine, default in zip(
            one.names, one.work, one.tried[best], one.tried[entry.default], strict=True
        ):
            print(f"  {entry.label} [{name}]: {rate(entry, work, mine)} against {1e6 * default:.1f} us, {best}")
    changed = sum(bool(one.tried) and one.best(e.default) != e.default for e, one in zip(entries, found, strict=True))
    print(f"{changed} of {len(entries)} entries differ from their defaults")


def print_library(entries: list[Entry], arena: Arena) -> None:
    """What torch's own product for one token takes."""
    for entry in entries:
        if entry.operation == "gemv":
            (case,) = entry.cases(arena)
            print(f"  {entry.label} by cuBLAS: {rate(entry, case.work, _warm(case))}")


def _warm(case: Case) -> float:
    case.launches[0](None)
    return replayed(case, None)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table, e.g. kernels/tables/h100.json")
    parser.add_argument("--budget", type=float, default=125, help="seconds after which no further entry is begun")
    parser.add_argument("--only", default="", help="entries whose label has this only (the others get their defaults)")
    args = parser.parse_args()
    began = time.perf_counter()
    entries = all_entries()
    chosen = [entry for entry in entries if args.only in entry.label]
    arena = Arena(DEVICE, ARENA_ELEMENTS)
    about = {
        "device": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": {name: round(value) for name, value in measure_ceilings().items()},
        "figures": "microseconds of a launch, [as tuned, by default]",
        "products": json.loads(args.out.read_text()).get("products", []) if args.out.exists() else [],
    }
    print(json.dumps(about), flush=True)
    gc.freeze()  # every capture collects garbage
    print_library(chosen, arena)
    print(f"prepared in {time.perf_counter() - began:.1f} s", flush=True)
    rest = [entry for entry in entries if entry not in chosen]

    def write(found: list[Found]) -> None:
        table = table_of([*chosen, *rest], [*found, *(Found() for _ in rest)], about)
        temporary = args.out.with_suffix(".new")
        temporary.write_text(render(table) + "\n")
        temporary.replace(args.out)

    found = search(chosen, arena, replayed, write, lambda: time.perf_counter() - began > args.budget)
    summarize(chosen, found)
    print(f"{args.out} after {time.perf_counter() - began:.1f} s", flush=True)
    torch_attention.compare(arena)


if __name__ == "__main__":
    main()
