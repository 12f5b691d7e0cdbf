"""Many exact streams for a while, then clients that leave, then everything must be as it was.

    python benchmarks/soak.py --streams 64 --seconds 60 --leavers 200

An own local Ray with the embedded demo model. Every stream is compared with the whole answer to the same request. At
the end leases, requests and blocks must balance, and tasks, threads, file descriptors and memory of the ingress, the
dispatcher and the ranks must be back where they were after one warm-up round. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import sys
import time
from collections.abc import Callable

from cluster.environment import free_port, prepare_ray

prepare_ray()

from cluster_state import grown, unsettled, vitals  # noqa: E402
from exact_streams import Client, make_asks, references, run_leavers, run_streams  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection  # noqa: E402

SETTLE_SECONDS = 60.0  # HAProxy keeps idle connections for a while
WARM_UP = 0.15  # of the seconds and of the leavers


def settled(check: Callable[[], str]) -> str:
    """ "" as soon as `check` finds nothing, else what it found at last."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (found := check()) and time.monotonic() < deadline:
        time.sleep(0.25)
    return found


async def load(base_url: str, args: argparse.Namespace, share: float, progress: Progress, name: str) -> list[str]:
    """One round: `share` of the seconds and the leavers. What was wrong."""
    client = Client(base_url)
    asks = make_asks(args.seed, 96)
    expected = await references(client, asks)
    seconds, leavers = args.seconds * share, round(args.leavers * share)
    ends: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    bar = progress.add_task(f"{name}: streams", total=None, unit="")

    def ended(wrong: str) -> None:
        ends[wrong] += 1
        spent = min(time.monotonic() - began, seconds)
        progress.update(bar, total=seconds, completed=spent, unit=f"{ends['']} exact, {ends.total() - ends['']} wrong")

    await run_streams(client, asks, expected, streams=args.streams, seconds=seconds, ended=ended)
    progress.update(bar, completed=seconds)
    bar = progress.add_task(f"{name}: leavers", total=leavers, unit="")
    gone: collections.Counter[bool] = collections.Counter()

    def left(was_inside: bool) -> None:
        gone[was_inside] += 1
        progress.update(bar, advance=1, unit=f"{gone[True]} in the middle")

    await run_leavers(client, args.seed, leavers, at_once=args.streams, left=left)
    progress.console.print(
        f"{name}: {ends['']} exact streams of {ends.total()} in {seconds:.0f} s, {args.streams} at once; "
        f"{gone[True]} of {leavers} clients left in the middle"
    )
    wrong = [f"{n} streams: {text}" for text, n in ends.items() if text]
    if gone[True] * 2 < leavers:
        wrong.append("too few clients left in the middle: the run says nothing about them")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--leavers", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = ClusterConfig(model=ModelSection(path="demo", replicas=args.replicas), http=HttpSection(port=free_port()))
    wrong: list[str] = []
    columns = TextColumn("{task.description:20}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[unit]}")
    try:
        base_url = bring_up(config, address=None, progress=print).base_url
        await_running(lambda text: None)
        with Progress(*columns) as progress:
            wrong += asyncio.run(load(base_url, args, WARM_UP, progress, "warm-up"))
            wrong += filter(None, [settled(unsettled)])
            baseline = vitals(base_url)
            wrong += asyncio.run(load(base_url, args, 1.0, progress, "soak"))
        wrong += filter(None, [settled(unsettled), settled(lambda: grown(baseline, vitals(base_url)))])
        for name, now in vitals(base_url).items():
            print(f"{name}: {baseline.get(name)}\n{'':{len(name)}}  {now}")
    finally:
        bring_down(own_ray=True)
    print("\n".join(wrong) or "all exact, all settled, nothing grown")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
