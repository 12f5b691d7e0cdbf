"""What docs/qos.md promises, measured on running clusters: real Ray Serve, the demo model, real HTTP.

    python benchmarks/qos_live.py [G1 G3 G4 G6 G7 G8 G10] [--pairs 8] [--crowd 50] [--json FILE]

Each part starts a cluster of its own. Where speeds are compared it is in interleaved pairs, with the median and its
95 % interval (bootstrap): the machine is small and shared. A bound is missed where the interval excludes it; then the
exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from live import charges, flood, ingresses, overload, quotas, spoofs
from live.figures import Figure, show, write

PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "G1": lambda given: flood.measure(given.pairs, given.crowd),
    "G3": lambda given: quotas.measure_shares(),
    "G4": lambda given: quotas.measure_speed(given.pairs),
    "G6": lambda given: ingresses.measure(given.ingresses, given.seconds, given.trials),
    "G7": lambda given: spoofs.measure(),
    "G8": lambda given: charges.measure(given.seconds),
    "G10": lambda given: overload.measure(given.seconds),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--crowd", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load in G6, G8 and G10")
    parser.add_argument("--ingresses", type=int, nargs="+", default=[1, 2, 4], help="numbers of them to compare (G6)")
    parser.add_argument("--trials", type=int, default=3, help="deaths of the dispatcher (G6)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {}
    for part in PARTS if "all" in given.parts else given.parts:
        found[part] = PARTS[part](given)
        show(part, found[part])
    if given.json:
        write(given.json, found)
    sys.exit(any(f.missed for figures in found.values() for f in figures))


if __name__ == "__main__":
    main()
