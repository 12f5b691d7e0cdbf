"""What HTTP leaves of the engine: tokens a second and time to the first token, over HTTP against an engine in process.

    python benchmarks/http_share.py [--streams 64] [--tokens 256] [--rounds 8] [--replicas 1]

The demo model on the CPU; client, HAProxy, ingress and ranks share this machine's cores with nobody but each other. The
engine in process has a process of its own (`engine_process.py`) for each way to run it: with one thread and with
one for each core, which wait for each other as torch's do, and as those of a rank. The best of them, by its median,
is the baseline. The cluster is as `echelon serve` makes it, and idle while they run, and they while it runs; each round
over HTTP lies between two of each of them, and its share is to their mean. Prompts are fresh every time.

The CPU time of a token tells where the rest is: of the cluster's processes by what they do, of the client, and of the
engine's own threads in process. The time to the first token is taken one request at a time: what HTTP, the front and
the dispatcher add to the engine's own.
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
from engine_process import EngineProcess, Prompts, Ran  # noqa: E402
from stream_client import play, post  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection, threads_per_rank  # noqa: E402
from cluster.environment import RANK_ENV, cpu_count  # noqa: E402

PROMPT_TOKENS = 32
VOCABULARY = range(10, 1000)
TICK = os.sysconf("SC_CLK_TCK")
ROLES = {  # by a word of the command line
    "RankActor": "rank", "ServeReplica:replicas": "supervisor", "ServeReplica:front": "ingress", "haproxy": "HAProxy",
    "Dispatcher": "dispatcher", "Gateway": "gateway", "ServeController": "Serve's controller",
}  # fmt: skip


def prompts(rng: random.Random, count: int) -> Prompts:
    return [tuple(rng.choices(VOCABULARY, k=PROMPT_TOKENS)) for _ in range(count)]


def body(prompt: tuple[int, ...], tokens: int) -> dict[str, object]:
    return {
        "model": "demo", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "skip_special_tokens": False,
    }  # fmt: skip


def cpu_seconds() -> dict[str, float]:
    """CPU time so far by role: the client's, the cluster's by what they do, and all others of Ray's together."""
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
        role = next((role for word, role in ROLES.items() if word in command), "Ray's daemons")
        spent[role] += (int(fields[11]) + int(fields[12])) / TICK
    return spent


def in_process(engine: EngineProcess, asked: Prompts, tokens: int) -> Ran:
    engine.begin(asked, tokens)
    return engine.end()


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


def ways() -> dict[str, EngineProcess]:
    """The engine in process, in every way that is tried."""
    found = {}
    for threads in sorted({1, cpu_count()}):
        found[f"{threads} thread{'s' * (threads > 1)}"] = EngineProcess(threads, {})
        if threads > 1:  # one has nobody to wait for
            found[f"{threads} threads that wait as a rank's"] = EngineProcess(threads, RANK_ENV)
    return found


def shown(values: list[float], unit: str = "") -> str:
    median, least, greatest = map(_figure, (statistics.median(values), min(values), max(values)))
    return f"{median}{unit} ({least} to {greatest}, n={len(values)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_share(address: tuple[str, int], engines: dict[str, EngineProcess], args: argparse.Namespace) -> str:
    """Prints the shares and the profile; returns the way that was best in process."""
    rng, total = random.Random(0), args.tokens * args.streams
    inside: dict[str, list[Ran]] = {way: [] for way in engines}
    outside: list[float] = []
    idle: list[float] = []  # of the cluster, in cores
    spent: dict[str, list[float]] = defaultdict(list)
    in_process_once(engines, rng, args)
    over_http(address, prompts(rng, args.streams), args.tokens)  # both are warm
    for i in range(args.rounds + 1):
        load = os.getloadavg()[0]
        before, began = sum(cpu_seconds().values()), time.perf_counter()
        for way, ran in in_process_once(engines, rng, args, first=i).items():
            inside[way].append(ran)
        idle.append((sum(cpu_seconds().values()) - before) / (time.perf_counter() - began))
        last = ", ".join(f"{total / rans[-1].seconds:,.0f}" for rans in inside.values())
        print(f"round {i}: {last} tokens/s in process (load before: {load:.1f})", end="", flush=True)
        if i == args.rounds:
            print()
            break
        spent_before = cpu_seconds()
        outside.append(total / over_http(address, prompts(rng, args.streams), args.tokens))
        for role, seconds in cpu_seconds().items():
            spent[role].append((seconds - spent_before.get(role, 0.0)) / total * 1e6)
        print(f", {outside[-1]:,.0f} over HTTP", flush=True)
    print(f"tokens/s at {args.streams} streams of {args.tokens}: over HTTP {shown(outside)}")
    best = min(inside, key=lambda way: statistics.median(ran.seconds for ran in inside[way]))
    for way, rans in inside.items():
        rates = [total / ran.seconds for ran in rans]
        shares = [rate * 2 / (a + b) for rate, a, b in zip(outside, rates, rates[1:], strict=False)]
        print(f"in process, {way}: {shown(rates)}, CPU a token {shown([r.cpu / total * 1e6 for r in rans], ' us')}")
        print(f"    share over HTTP: {shown(shares)}{' (THE BASELINE)' if way == best else ''}")
    print(f"the idle cluster beside the engines in process: {shown(idle)} cores")
    print("CPU a token over HTTP:")
    for role, values in sorted(spent.items(), key=lambda kv: -statistics.median(kv[1])):
        print(f"    {role}: {shown(values, ' us')}")
    return best


def in_process_once(
    engines: dict[str, EngineProcess], rng: random.Random, args: argparse.Namespace, first: int = 0
) -> dict[str, Ran]:
    """One run of each, beginning with number `first`: none is always the one after HTTP."""
    order = [list(engines)[(first + n) % len(engines)] for n in range(len(engines))]
    return {way: in_process(engines[way], prompts(rng, args.streams), args.tokens) for way in order}


def measure_first(address: tuple[str, int], engine: EngineProcess, count: int) -> None:
    rng = random.Random(1)
    inside, outside, added = [], [], []
    for i in range(count + 5):
        (a,), (b,) = prompts(rng, 1), prompts(rng, 1)
        ran = in_process(engine, [a], 2)
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
    engines: dict[str, EngineProcess] = {}
    try:
        parts = urlsplit(bring_up(config, address=None, progress=print).base_url)
        await_running(lambda text: None)
        assert parts.hostname is not None
        assert parts.port is not None
        address = parts.hostname, parts.port
        print(f"over HTTP: replicas {args.replicas}, threads of a rank {threads_per_rank(config)}")
        engines |= ways()
        best = measure_share(address, engines, args)
        measure_first(address, engines[best], args.firsts)
    finally:
        for engine in engines.values():
            engine.close()
        bring_down(own_ray=True)


if __name__ == "__main__":
    main()
