"""The shipped policy, dispatcher and engine scheduler under a virtual clock.

    python benchmarks/simulate.py guarantees [--json FILE] [--trials 10000] [--processes 2] [--state FILE]
    python benchmarks/simulate.py suites [--pictures docs/pictures]
    python benchmarks/simulate.py dispatch [--seeds 3] [--json FILE]
    python benchmarks/simulate.py scale [--replicas 1000] [--requests 1000000] [--seed 1]
    python benchmarks/simulate.py what-if TRACE [--qos-config-path FILE] [--replicas N]

Only the device is a model: a step takes a fixed time and so much for each prompt token, decoding sequence and KV token
read. `guarantees` exits with 1 when one does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulation import commands


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands.declare(parser.add_subparsers(dest="command", required=True))
    given = parser.parse_args()
    passed, written = given.run(given)
    if getattr(given, "json", None) is not None:
        given.json.write_text(json.dumps(written, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
