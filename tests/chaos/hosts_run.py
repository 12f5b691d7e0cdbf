"""The bench over several hosts of namespaces: a head without replicas, workers with one each; links are cut, hosts die.

    PYTHONPATH=.:tests:benchmarks python -m chaos.hosts_run --workers 3 -- --only "link cut and healed" --trials 20

Needs root (`hosts.pretend.why_not` says what else). What follows `--` goes to the bench, which runs on the head.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hosts.pretend import STATE, Host, Hosts, why_not

from chaos.cables import serve_cables

ROOT = Path(__file__).parents[2]
PORT = 6379
RAY = "RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_SERVE_ENABLE_HA_PROXY=1 ray start"
SMALL = "--object-store-memory=100000000 --disable-usage-stats"
AGENT_SECONDS = 16.0  # a raylet whose agents are not up within 15 s, on a busy machine, ends by itself
STARTS = 4


def start_head(host: Host) -> None:
    """Ray's head, which has no CPUs for ranks."""
    host.run(
        f"{RAY} --head --port={PORT} --node-ip-address={host.address} --num-cpus=0 --include-dashboard=false {SMALL}"
    )


def start_worker(host: Host, head: Host) -> None:
    """A node with room for one rank, there to stay. Raises AssertionError where it ends by itself again and again."""
    for _ in range(STARTS):
        host.run(f"{RAY} --address={head.address}:{PORT} --node-ip-address={host.address} --num-cpus=1 {SMALL}")
        deadline = time.monotonic() + AGENT_SECONDS
        while any("/raylet/raylet " in line for line in host.processes().values()):
            if time.monotonic() > deadline:
                return
            time.sleep(1.0)
        host.run("ray stop -f", check=False)
    raise AssertionError(f"{host.name}: {STARTS} raylets have ended within {AGENT_SECONDS:g} s")


def main() -> None:
    """Hosts up, Ray up, the bench on the head, hosts down. Ends with the bench's status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--prefix", default="ehchaos")
    parser.add_argument("--subnet", default="10.77.90")
    parser.add_argument("bench", nargs="*", help="arguments of the bench")
    args = parser.parse_args()
    if missing := why_not():
        raise SystemExit(missing)
    environment = {"PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "tests", "benchmarks"))}
    with (
        tempfile.TemporaryDirectory(dir=STATE) as folder,
        Hosts(args.workers + 1, prefix=args.prefix, subnet=args.subnet, environment=environment) as hosts,
    ):
        head, *workers = hosts
        start_head(head)
        with ThreadPoolExecutor(len(workers)) as pool:
            list(pool.map(lambda worker: start_worker(worker, head), workers))
        by_name = {host.name: host for host in workers}

        def reboot(name: str) -> None:
            by_name[name].start()
            by_name[name].await_ssh()
            start_worker(by_name[name], head)

        acts = {
            "cut": lambda name: by_name[name].cut(),
            "heal": lambda name: by_name[name].heal(),
            "kill": lambda name: by_name[name].kill(),
            "start": reboot,
        }
        names = ",".join(f"{host.address}={host.name}" for host in workers)
        bench = [
            "python", "-m", "chaos", "--join", f"{head.address}:{PORT}", "--cables", folder, "--hosts", names,
            "--replicas", str(len(workers)), *args.bench,
        ]  # fmt: skip
        running = subprocess.Popen(head.ssh_command(f"cd {shlex.quote(str(ROOT))} && {shlex.join(bench)}"))
        serve_cables(Path(folder), acts, lambda: running.poll() is None)
    sys.exit(running.returncode)


if __name__ == "__main__":
    main()
