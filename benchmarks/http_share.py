"""What HTTP leaves of the engine: tokens a second and time to the first token, over HTTP against an engine in process.

    python benchmarks/http_share.py [--streams 64] [--tokens 256] [--rounds 5] [--replicas 1]

The demo model on the CPU; client, HAProxy, ingress and ranks share this machine's cores with nobody but each other. A
cluster and an engine in this process take turns, each idle while the other is measured; all figures are ratios (or
differences) of neighbours in that order, with fresh prompts every round. The time to the first token is taken one
request at a time: what HTTP, the front and the dispatcher add to the engine's own.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import replace
from urllib.parse import urlsplit

from cluster.environment import free_port, prepare_ray

prepare_ray()

import uvloop  # noqa: E402
from stream_client import play, post  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection, resolve_model, threads_per_rank  # noqa: E402
from workers.api.request import EngineRequest, SamplingParams  # noqa: E402
from workers.engine.core import Engine  # noqa: E402
from workers.rank import Rank, run_to_completion  # noqa: E402

PROMPT_TOKENS = 32
VOCABULARY = range(10, 1000)

Prompts = list[tuple[int, ...]]


def prompts(rng: random.Random, count: int) -> Prompts:
    return [tuple(rng.choices(VOCABULARY, k=PROMPT_TOKENS)) for _ in range(count)]


def body(prompt: tuple[int, ...], tokens: int) -> dict[str, object]:
    return {
        "model": "demo", "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "skip_special_tokens": False,
    }  # fmt: skip


def requests(asked: Prompts, tokens: int, tag: str) -> list[EngineRequest]:
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    return [EngineRequest(f"{tag}/{i}", p, params) for i, p in enumerate(asked)]


def in_process(engine: Engine, asked: Prompts, tokens: int, tag: str) -> float:
    """Tokens a second."""
    began = time.perf_counter()
    made = run_to_completion(engine, requests(asked, tokens, tag))
    seconds = time.perf_counter() - began
    assert all(len(ids) == tokens for ids in made.values())
    return tokens * len(asked) / seconds


def over_http(address: tuple[str, int], asked: Prompts, tokens: int) -> float:
    """Tokens a second. Raises RuntimeError where the streams brought too few events to be whole."""
    played = uvloop.run(play(*address, [[post("/v1/completions", body(p, tokens))] for p in asked]))
    if played.events < 0.8 * tokens * len(asked):  # a piece of a character has no event of its own
        raise RuntimeError(f"{played.events} events for {tokens * len(asked)} tokens: streams are not whole")
    return tokens * len(asked) / played.seconds


def first_in_process(engine: Engine, prompt: tuple[int, ...], tag: str) -> float:
    """Seconds to the first token."""
    began = time.perf_counter()
    engine.submit(requests([prompt], 2, tag)[0])
    while not engine.step():
        pass
    seconds = time.perf_counter() - began
    while engine.has_work:
        engine.step()
    return seconds


def first_over_http(address: tuple[str, int], prompt: tuple[int, ...]) -> float:
    """Seconds to the first event with text, with a connection of its own that stands already."""
    (stream,) = uvloop.run(play(*address, [[post("/v1/completions", body(prompt, 2))]], text_event=1)).streams
    return stream.first_text - stream.began


def shown(values: list[float], unit: str = "") -> str:
    least, greatest = min(values), max(values)
    return f"{statistics.median(values):.3g}{unit} ({least:.3g} to {greatest:.3g}, n={len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--firsts", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()
    config = ClusterConfig(model=ModelSection(path="demo", replicas=args.replicas), http=HttpSection(port=free_port()))
    rng = random.Random(0)
    try:
        parts = urlsplit(bring_up(config, address=None, progress=print).base_url)
        await_running(lambda text: None)
        assert parts.hostname is not None
        assert parts.port is not None
        address = parts.hostname, parts.port
        replica = config.replica_config("cpu")
        replica = replace(replica, model=replace(replica.model, path=str(resolve_model("demo"))))
        engine = Rank(replica, threads=threads_per_rank(config) * args.replicas).make_engine()
        ours, theirs, shares, added = [], [], [], []
        for i in range(args.rounds + 1):
            load = os.getloadavg()[0]
            inside = in_process(engine, prompts(rng, args.streams), args.tokens, f"round {i}")
            outside = over_http(address, prompts(rng, args.streams), args.tokens)
            print(f"round {i}: {inside:,.0f} tokens/s in process, {outside:,.0f} over HTTP (load before: {load:.1f})")
            if i:  # the first round warms up
                ours.append(outside)
                theirs.append(inside)
                shares.append(outside / inside)
        firsts: tuple[list[float], list[float]] = [], []
        for i in range(args.firsts + 5):
            (a,), (b,) = prompts(rng, 1), prompts(rng, 1)
            inside, outside = first_in_process(engine, a, f"first {i}"), first_over_http(address, b)
            if i >= 5:
                firsts[0].append(inside * 1e3)
                firsts[1].append(outside * 1e3)
                added.append((outside - inside) * 1e3)
        print(f"tokens/s at {args.streams} streams: in process {shown(theirs)}, over HTTP {shown(ours)}")
        print(f"share over HTTP: {shown(shares)}")
        print(f"first token, ms: in process {shown(firsts[0])}, over HTTP {shown(firsts[1])}; added {shown(added)}")
    finally:
        bring_down(own_ray=True)


if __name__ == "__main__":
    main()
