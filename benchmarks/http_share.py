"""What HTTP leaves of the engine: tokens a second and time to the first token, over HTTP against an engine in process.

    python benchmarks/http_share.py [--streams 64] [--tokens 256] [--rounds 8] [--replicas 1]

The demo model on the CPU; client, HAProxy, ingress and ranks share this machine's cores with nobody but each other. The
engine in process has a process of its own for each replica, with the ranks' own configuration, number of threads and
environment (`engine_process.py`); the cluster is idle while it runs, and the other way round. They take turns, all
figures are ratios (or differences) of neighbours in that order, with fresh prompts every round. `CPU` is what each kind
of process used for a token, the engine's own threads in process included. The time to the first token is taken one
request at a time: what HTTP, the front and the dispatcher add to the engine's own.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

from cluster.environment import free_port, prepare_ray

prepare_ray()

import uvloop  # noqa: E402
from cluster_state import ready_rows  # noqa: E402
from engine_process import EngineProcess, Prompts, Ran  # noqa: E402
from stream_client import play, post  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection, threads_per_rank  # noqa: E402

PROMPT_TOKENS = 32
VOCABULARY = range(10, 1000)
TICK = os.sysconf("SC_CLK_TCK")
OF_THREADS = ("OMP_", "MKL_", "KMP_", "GOMP_")  # variables that set how torch computes
ROLES = {"RankActor": "rank", "ingress": "ingress", "haproxy": "HAProxy", "Dispatcher": "dispatcher"}


def prompts(rng: random.Random, count: int) -> Prompts:
    return [tuple(rng.choices(VOCABULARY, k=PROMPT_TOKENS)) for _ in range(count)]


def body(prompt: tuple[int, ...], tokens: int) -> dict[str, object]:
    return {
        "model": "demo", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "skip_special_tokens": False,
    }  # fmt: skip


def cpu_seconds() -> dict[str, float]:
    """CPU time so far by role: ours, the cluster's processes by what they do, and all others of Ray's together."""
    spent: dict[str, float] = defaultdict(float)
    spent["client"] = time.process_time()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if "ray" not in command or int(folder.name) == os.getpid():
            continue
        role = next((role for word, role in ROLES.items() if word in command), "Ray")
        spent[role] += (int(fields[11]) + int(fields[12])) / TICK
    return spent


def in_process(engines: list[EngineProcess], asked: Prompts, tokens: int) -> list[Ran]:
    """All of `asked`, an equal part for each engine, at the same time."""
    for i, engine in enumerate(engines):
        engine.begin(asked[i :: len(engines)], tokens)
    return [engine.end() for engine in engines]


def over_http(address: tuple[str, int], asked: Prompts, tokens: int) -> float:
    """Seconds. Raises RuntimeError where the streams brought too few events to be whole."""
    played = uvloop.run(play(*address, [[post("/v1/completions", body(p, tokens))] for p in asked]))
    if played.events < 0.8 * tokens * len(asked):  # a piece of a character has no event of its own
        raise RuntimeError(f"{played.events} events for {tokens * len(asked)} tokens: streams are not whole")
    return played.seconds


def first_over_http(address: tuple[str, int], prompt: tuple[int, ...]) -> float:
    """Seconds to the first event with text, with a connection of its own that stands already."""
    (stream,) = uvloop.run(play(*address, [[post("/v1/completions", body(prompt, 2))]], text_event=1)).streams
    return stream.first_text - stream.began


def environment_of(pid: int) -> dict[str, str]:
    """The variables of a process that set how torch computes."""
    pairs = (v.partition("=") for v in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs if name.startswith(OF_THREADS)}


def shown(values: list[float], unit: str = "") -> str:
    least, greatest = min(values), max(values)
    return f"{statistics.median(values):.3g}{unit} ({least:.3g} to {greatest:.3g}, n={len(values)})"


def measure_share(address: tuple[str, int], engines: list[EngineProcess], args: argparse.Namespace) -> None:
    rng, total = random.Random(0), args.tokens * args.streams
    ours, theirs, shares, own = [], [], [], []
    spent: dict[str, list[float]] = defaultdict(list)
    for i in range(args.rounds + 1):
        load = os.getloadavg()[0]
        ran = in_process(engines, prompts(rng, args.streams), args.tokens)
        before = cpu_seconds()
        inside, outside = (
            total / max(r.seconds for r in ran),
            total / over_http(address, prompts(rng, args.streams), args.tokens),
        )
        after = cpu_seconds()
        print(f"round {i}: {inside:,.0f} tokens/s in process, {outside:,.0f} over HTTP (load before: {load:.1f})")
        if not i:  # it warms up
            continue
        ours.append(outside)
        theirs.append(inside)
        shares.append(outside / inside)
        own.append(sum(r.cpu for r in ran) / total * 1e6)
        for role, seconds in after.items():
            spent[role].append((seconds - before.get(role, 0.0)) / total * 1e6)
    print(f"tokens/s at {args.streams} streams: in process {shown(theirs)}, over HTTP {shown(ours)}")
    print(f"share over HTTP: {shown(shares)}")
    print(f"CPU a token: in process {shown(own, ' us')}")
    for role, values in sorted(spent.items(), key=lambda kv: -statistics.median(kv[1])):
        print(f"    over HTTP, {role}: {shown(values, ' us')}")


def measure_first(address: tuple[str, int], engine: EngineProcess, count: int) -> None:
    rng = random.Random(1)
    inside, outside, added = [], [], []
    for i in range(count + 5):
        (a,), (b,) = prompts(rng, 1), prompts(rng, 1)
        (ran,) = in_process([engine], [a], 2)
        first = first_over_http(address, b)
        if i >= 5:
            inside.append(ran.first * 1e3)
            outside.append(first * 1e3)
            added.append((first - ran.first) * 1e3)
    print(f"first token, ms: in process {shown(inside)}, over HTTP {shown(outside)}; added {shown(added)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--firsts", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()
    config = ClusterConfig(model=ModelSection(path="demo", replicas=args.replicas), http=HttpSection(port=free_port()))
    engines: list[EngineProcess] = []
    try:
        parts = urlsplit(bring_up(config, address=None, progress=print).base_url)
        await_running(lambda text: None)
        assert parts.hostname is not None
        assert parts.port is not None
        address = parts.hostname, parts.port
        threads, environment = threads_per_rank(config), environment_of(ready_rows()[0].info.pid)
        print(f"{args.replicas} engines of {threads} threads, {environment or 'no variables of threads'}")
        engines += [EngineProcess(threads, environment) for _ in range(args.replicas)]
        measure_share(address, engines, args)
        measure_first(address, engines[0], args.firsts)
    finally:
        for engine in engines:
            engine.close()
        bring_down(own_ray=True)


if __name__ == "__main__":
    main()
