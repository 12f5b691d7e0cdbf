"""How long a death shows: kill -9 or SIGSTOP of a rank, kill -9 of a supervisor, of one of two replicas.

    python benchmarks/recovery.py --trials 5

For each trial: the latency of the next request after the kill, the longest pause of the stream that ran on the victim,
and the seconds until two replicas are ready again. The demo model, two replicas, an own local Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from cluster.environment import free_port, prepare_ray

prepare_ray()

import ray  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection  # noqa: E402
from cluster.names import DISPATCHER, NAMESPACE, replicas_app  # noqa: E402


def ready() -> list[Any]:
    """Rows of the replicas that take leases."""
    dispatcher = ray.get_actor(DISPATCHER, namespace=NAMESPACE)
    return [r for r in ray.get(dispatcher.status.remote()).rows if r.state == "ready"]


def post(base_url: str, **body: Any) -> Any:
    """An open answer to one chat."""
    messages = [{"role": "user", "content": "Count from 1 to 20."}]
    data = json.dumps({"model": "demo", "messages": messages, "temperature": 0, **body}).encode()
    headers = {"content-type": "application/json"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{base_url}/chat/completions", data=data, headers=headers), timeout=60
    )


def kill_rank(row: Any) -> None:
    """SIGKILL to rank 0."""
    os.kill(row.info.pid, signal.SIGKILL)


def stop_rank(row: Any) -> None:
    """SIGSTOP to rank 0: it hangs."""
    os.kill(row.info.pid, signal.SIGSTOP)


def kill_supervisor(row: Any) -> None:
    """SIGKILL to the replica's Serve process."""
    ray.kill(ray.get_actor(f"SERVE_REPLICA::{replicas_app('demo')}#demo#{row.info.id}", namespace="serve"))


def trial(base_url: str, kill: Callable[[Any], None], *, streaming: bool) -> tuple[float, float]:
    """(seconds that the client noticed, seconds until two replicas were ready again)."""
    while len(ready()) < 2:
        time.sleep(0.05)
    if streaming:
        pause, last, events, killed = 0.0, time.perf_counter(), 0, 0.0
        for line in post(base_url, stream=True, max_tokens=600, ignore_eos=True):
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            pause, last, events = max(pause, now - last), now, events + 1
            if events == 50:
                victim = next(r for r in ready() if r.leases)
                kill(victim)
                pause, killed = 0.0, time.perf_counter()
                last = killed
        noticed = pause
    else:
        victim = ready()[0]
        kill(victim)
        killed = time.perf_counter()
        with post(base_url, max_tokens=8) as answer:
            assert answer.status == 200
        noticed = time.perf_counter() - killed
    while len(rows := ready()) < 2 or victim.info.id in [r.info.id for r in rows]:
        time.sleep(0.05)
    return noticed, time.perf_counter() - killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
    config = ClusterConfig(model=ModelSection(path="demo", replicas=2), http=HttpSection(port=free_port()))
    base_url = bring_up(config, address=None, progress=lambda text: None).base_url
    try:
        await_running(lambda text: None)
        for name, kill, streaming in (
            ("rank, idle: next request", kill_rank, False),
            ("supervisor, idle: next request", kill_supervisor, False),
            ("rank, streaming: longest pause", kill_rank, True),
            ("rank stopped, idle: next request", stop_rank, False),
            ("rank stopped, streaming: longest pause", stop_rank, True),
        ):
            trials = [trial(base_url, kill, streaming=streaming) for _ in range(args.trials)]
            for what, values in (("", [t[0] for t in trials]), (" / two replicas again", [t[1] for t in trials])):
                print(
                    f"{name}{what}: {statistics.median(values):.2f} s "
                    f"({min(values):.2f} to {max(values):.2f}, n={len(values)})"
                )
    finally:
        bring_down(own_ray=True)


if __name__ == "__main__":
    main()
