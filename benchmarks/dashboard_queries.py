"""Every query of every dashboard against a real Prometheus that scrapes a live cluster.

    python benchmarks/dashboard_queries.py --prometheus /usr/bin/prometheus     # Debian: apt-get install prometheus

An own local Ray with the demo model, two replicas with few blocks that copy to host memory, tiers, some load with
sessions, one replica killed. Prints each query that Prometheus refuses or that shows nothing; exit status 1 if there is
one. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.environment import free_port, prepare_ray

prepare_ray()

import ray  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, DispatchSection, EngineSection, HttpSection, ModelSection  # noqa: E402
from cluster.names import DISPATCHER, NAMESPACE  # noqa: E402

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
SCRAPE_SECONDS = 5
LOAD_SECONDS = 60.0
MAY_BE_EMPTY = ("echelon_refusals_total", "echelon_replays_total", "qos_bound_violations_total")  # nothing happened


def queries(folder: Path) -> Iterator[tuple[str, str]]:
    """(dashboard and panel, expression) of every target."""
    for file in sorted(folder.glob("*.json")):
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{dashboard['title']} / {panel['title']}", target["expr"].replace("$model", ".*")


def write_prometheus(folder: Path, target: str) -> Path:
    """The shipped configuration, with `target` and a quick scrape."""
    text = (GRAFANA / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:23333", target).replace(
        "scrape_interval: 15s", f"scrape_interval: {SCRAPE_SECONDS}s"
    )
    file = folder / "prometheus.yml"
    file.write_text(text)
    return file


def ask(base_url: str, path: str, user: str, **body: Any) -> None:
    """One request of `user`."""
    data = json.dumps({"model": "demo", "user_id": user, **body}).encode()
    request = urllib.request.Request(
        f"{base_url}/chat/{path}_qos", data=data, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def load(base_url: str, seconds: float) -> None:
    """Some users for a while; in the middle a replica is killed."""
    until = time.monotonic() + seconds

    def run(number: int) -> None:
        user, rounds = f"user_id{number}", 0
        while time.monotonic() < until:
            asked: dict[str, Any] = {"messages": "Count from 1 to 20.", "max_tokens": 30 + 10 * number}
            ask(base_url, "completions", user, stream=number % 2 == 0, **asked)
            asked = {"prompt": "And then?", "session_id": rounds // 3, "request_output_len": 30}
            ask(base_url, "interactive", user, interactive_mode=True, **asked)
            rounds += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    rows = ray.get(ray.get_actor(DISPATCHER, namespace=NAMESPACE).status.remote()).rows
    os.kill(max(rows, key=lambda r: r.leases).info.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()


def result(port: int, expression: str) -> list[Any]:
    """What Prometheus answers over the whole run, by series. Raises RuntimeError for an expression that it refuses."""
    now = time.time()
    words = urllib.parse.urlencode({"query": expression, "start": now - LOAD_SECONDS, "end": now, "step": 5})
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query_range?{words}", timeout=30) as answer:
            series: list[Any] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as e:
        raise RuntimeError(e.read().decode()) from e
    return [s for s in series if any(v != "NaN" for _, v in s["values"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="prometheus", help="its binary")
    args = parser.parse_args()
    config = ClusterConfig(
        model=ModelSection(replicas=2),
        engine=EngineSection(eviction_type="copy", num_blocks=64, num_cpu_blocks=256),
        http=HttpSection(port=free_port()),
        dispatch=DispatchSection(qos=str(ROOT / "configs" / "qos" / "tiers.json")),
    )
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        prometheus: subprocess.Popen[bytes] | None = None
        try:
            up = bring_up(config, address=None, progress=print)
            await_running(lambda text: None)
            file = write_prometheus(Path(folder), f"127.0.0.1:{config.http.port}")
            prometheus = subprocess.Popen(
                [
                    args.prometheus,
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder}/data",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stderr=subprocess.DEVNULL,
            )
            load(up.base_url, LOAD_SECONDS)
            time.sleep(2 * SCRAPE_SECONDS)
            for where, expression in queries(GRAFANA / "dashboards"):
                try:
                    series = result(port, expression)
                except RuntimeError as e:
                    wrong.append(f"{where}: {expression}: {e}")
                    continue
                print(f"{len(series):3} series  {where}: {expression}")
                if not series and not any(name in expression for name in MAY_BE_EMPTY):
                    wrong.append(f"{where}: nothing: {expression}")
        finally:
            if prometheus is not None:
                prometheus.terminate()
                prometheus.wait()
            bring_down(own_ray=True)
    print("\n".join(wrong) or "every query shows what it should")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
