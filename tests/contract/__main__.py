"""`make contract`: every block of the seed documents, executed against the demo model or given its reason.

PYTHONPATH=.:tests:benchmarks python -m contract [--only NAME ...] [--seeds FOLDER] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from contract import command_checks, local_checks, server_checks
from contract.page import PAGE, page
from contract.site import Site
from contract.table import Block, load, moved

ROOT = Path(__file__).resolve().parents[2]
Check = Callable[[Site], None]
MODULES = (local_checks, command_checks, server_checks)  # a Ray cluster of two ranks before the server, each alone


def checks() -> dict[str, Check]:
    """All checks by name, in the order in which they run."""
    return {
        name: function
        for module in MODULES
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and list(inspect.signature(function).parameters) == ["site"]
    }


def main() -> int:
    """The exit status: 0 when whatever can be executed is green."""
    parser = argparse.ArgumentParser(description="The documents of 2023-24 as an executable contract.")
    parser.add_argument("--only", nargs="+", help="names of checks")
    parser.add_argument("--seeds", type=Path, help="the documents' folder: are the lines still where the table says?")
    parser.add_argument("--write", action="store_true", help=f"write the table of {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    blocks = load()
    console = Console(highlight=False)
    if arguments.seeds is not None:
        wrong = moved(blocks, arguments.seeds)
        console.print(f"{len(blocks) - len(wrong)} of {len(blocks)} blocks stand where the table says", *wrong)
        return 1 if wrong else 0
    if arguments.write:
        PAGE.write_text(page(blocks, PAGE.read_text("utf-8")), "utf-8")
        return 0
    wanted = [b for b in blocks if not arguments.only or b.what in arguments.only]
    with tempfile.TemporaryDirectory(prefix="contract-") as folder:
        site = Site(Path(folder))
        os.environ["ECHELON_STATE_DIR"] = folder
        with contextlib.closing(site):
            failed = _run_checks({b.what for b in wanted if b.outcome == "check"}, site, console)
    failed |= _run_tests(sorted({b.what for b in wanted if b.outcome == "pytest"}), console)
    return _report(wanted, failed, console)


def _run_checks(names: set[str], site: Site, console: Console) -> dict[str, str]:
    failed: dict[str, str] = {}
    ended: dict[Check, str] = {}  # what went wrong, by function: one may have two names
    known = checks()
    for name in [n for n in known if n in names] + sorted(names - known.keys()):
        started, check = time.monotonic(), known[name]
        if check not in ended:
            try:
                check(site)
                ended[check] = ""
            except Exception as e:
                traceback.print_exc(limit=-2)
                ended[check] = f"{type(e).__name__}: {e}"
        if ended[check]:
            failed[name] = ended[check]
        console.print(f"{name:<24} {time.monotonic() - started:6.1f} s  {'FAILED' if ended[check] else 'ok'}")
    return failed


def _run_tests(ids: list[str], console: Console) -> dict[str, str]:
    if not ids:
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", *ids]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/workers'}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    passed = [line.split()[1].partition("[")[0] for line in done.stdout.splitlines() if line.startswith("PASSED")]
    bad = [
        line.split()[1].partition("[")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    failed = {name: "the test fails" for name in ids if name not in passed or name in bad}
    console.print(f"{len(ids) - len(failed)} of {len(ids)} tests pass")
    return failed


def _report(blocks: list[Block], failed: dict[str, str], console: Console) -> int:
    executed = [b for b in blocks if b.outcome in ("check", "pytest")]
    red = [b for b in executed if b.what in failed]
    for outcome, title in (("none", "cannot apply"), ("next", "next")):
        console.print(f"\n{title}:")
        for block in blocks:
            if block.outcome == outcome:
                console.print(f"  {block.id:<22} {block.title}: {block.what}", soft_wrap=True, markup=False)
    if red:
        console.print("\nfailing:")
        for block in red:
            console.print(f"  {block.id:<22} {block.title}: {failed[block.what]}"[:400], soft_wrap=True, markup=False)
    later = sum(b.outcome == "next" for b in blocks)
    never = sum(b.outcome == "none" for b in blocks)
    console.print(f"\n{len(executed) - len(red)} of {len(executed)} green; {later} next, {never} cannot apply")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
