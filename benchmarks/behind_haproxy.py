"""Events a second over HTTP, through HAProxy, Ray Serve and our front, from a replica that makes tokens for nothing.

    python benchmarks/behind_haproxy.py [--streams 64] [--tokens 512] [--rounds 3] [--step-ms 5 2 0]

The cluster is as `echelon serve` makes it, but for its replica: that of `added_ttft.py` takes its place, with a step
every so many milliseconds (0: one after the other; the front then reads several at a time, and joins their events).
Everything shares this machine's cores, client and replica too. `CPU` is what each of them used for an event.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from cluster.environment import free_port, prepare_ray

prepare_ray()

import ray  # noqa: E402
import uvloop  # noqa: E402
from added_ttft import MODEL, SLOTS, Replica, started  # noqa: E402
from cluster_state import dispatcher, ready_rows  # noqa: E402
from http_share import body, cpu_seconds, prompts, shown  # noqa: E402
from ray import serve  # noqa: E402
from stream_client import play, post  # noqa: E402

from cluster.app import await_running, bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, HttpSection, ModelSection  # noqa: E402
from cluster.names import replicas_app  # noqa: E402
from router.text.tokenizer import Tokenizer  # noqa: E402
from workers.api.channel import listen  # noqa: E402
from workers.api.replica import ReplicaInfo  # noqa: E402
from workers.api.wire import ENGINE_CODEC  # noqa: E402

CONTEXT, SCRIPT = 4096, "One, two, three; then a pause.\n"
PAUSE = 0.02  # seconds, while there is nothing to do


def replica(pipe: Connection) -> None:
    """Told the cluster's secret and the seconds between steps; tells its info."""

    async def main() -> None:
        secret, seconds = pipe.recv()
        engine = Replica(Tokenizer.from_folder(MODEL).encode(SCRIPT))
        listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=secret, handler=engine)
        engine.info = ReplicaInfo(f"fake-{seconds}", "demo", "127.0.0.1", listener.port, CONTEXT, SLOTS, CONTEXT, 16)
        pipe.send(engine.info)
        ended, now = asyncio.create_task(asyncio.to_thread(pipe.recv)), asyncio.get_running_loop().time
        due = now()
        while not ended.done():
            due = max(due + (seconds if engine.sequences else PAUSE), now())
            await asyncio.sleep(due - now())
            engine.step(list(engine.sequences))

    uvloop.run(main())


def one_round(address: tuple[str, int], args: argparse.Namespace, rng: random.Random) -> tuple[float, dict[str, float]]:
    """Events a second, and CPU microseconds an event by role."""
    asked = [[post("/v1/completions", body(p, args.tokens))] for p in prompts(rng, args.streams)]
    before = cpu_seconds()
    played = uvloop.run(play(*address, asked))
    total = args.streams * args.tokens
    spent = {role: (s - before.get(role, 0.0)) / total * 1e6 for role, s in cpu_seconds().items()}
    return total / played.seconds, spent


def measure(address: tuple[str, int], secret: str, step_ms: float, args: argparse.Namespace) -> None:
    process, pipe, info = started(replica, (secret, step_ms / 1e3))
    ray.get(dispatcher().register.remote(info))
    while [row.info.id for row in ready_rows()] != [info.id]:
        time.sleep(0.1)
    rng = random.Random(0)
    one_round(address, args, rng)  # warms up
    rates, spent = [], defaultdict(list)
    for _ in range(args.rounds):
        rate, by_role = one_round(address, args, rng)
        rates.append(rate)
        for role, micro in by_role.items():
            spent[role].append(micro)
    offered = f"{args.streams / step_ms * 1e3:,.0f} tokens/s" if step_ms else "as many as it can"
    print(f"offered {offered}: {shown(rates)} events/s; CPU an event, us:")
    for role, values in sorted(spent.items(), key=lambda kv: -statistics.median(kv[1])):
        print(f"    {role}: {shown(values)}")
    ray.get(dispatcher().unregister.remote(info.id, "measured"))
    pipe.send("end")
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 2.0, 0.0])
    args = parser.parse_args()
    config = ClusterConfig(model=ModelSection(path="demo"), http=HttpSection(port=free_port()))
    try:
        up = bring_up(config, address=None, progress=print)
        await_running(lambda text: None)
        serve.delete(replicas_app("demo"))
        parts = urlsplit(up.base_url)
        assert parts.hostname is not None
        assert parts.port is not None
        for step_ms in args.step_ms:
            measure((parts.hostname, parts.port), up.secret, step_ms, args)
    finally:
        bring_down(own_ray=True)


if __name__ == "__main__":
    main()
