"""A replica over several GPUs, its ranks Ray actors, served over HTTP: workloads, and what a lost rank costs.

    python benchmarks/served_gang.py --tp 2 --json FILE             # two GPUs: the 8B shape with random weights, W1, W3
    python benchmarks/served_gang.py --tp 2 --faults --json FILE    # the demo model in fp32: a rank killed, one stopped
    python benchmarks/served_gang.py --tp 2 --faults --device cpu

With --faults, --streams answers of --tokens tokens are read twice: in peace, and with a signal to one rank when all of
them have begun. `noticed` is the time from the signal until the other ranks of the gang are gone, `pause` the longest
gap that a stream saw. Every text must be the one of before; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import workloads

from cluster.environment import free_port, prepare_ray

prepare_ray()

from load.engine_target import DEMO  # noqa: E402
from load.http_target import HttpTarget  # noqa: E402
from load.options import measure  # noqa: E402
from load.records import make_console, summary, versions  # noqa: E402
from load.work import Pacing, make_work  # noqa: E402

from cluster.app import bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, EngineSection, HttpSection, ModelSection  # noqa: E402

FIGURES = ("requests_per_s", "output_tok_per_s", "tpot_ms_mean", "ftl_ms_mean")
GONE_SECONDS = 60.0
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass
class Heard:
    """What one stream has said so far, and when."""

    text: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def pause(self) -> float:
        """The longest time between two arrivals, in seconds."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def rank_pids() -> set[int]:
    """The ranks among this process's descendants that are not dead."""
    parents, ranks = {}, set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        parents[int(path.name)] = int(parent)
        if name.startswith(b"ray::RankActor") and state != "Z":
            ranks.add(int(path.name))

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return {pid for pid in ranks if is_ours(pid)}


async def listen(session: aiohttp.ClientSession, url: str, number: int, tokens: int, heard: Heard) -> None:
    """One answer, streamed."""
    prompt = [(number * 37 + i) % 1000 + 10 for i in range(24)]
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip
    async with session.post(f"{url}/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"stream {number}: {event['error']}")
                if event["choices"]:
                    heard.text += event["choices"][0]["text"]
                    heard.times.append(time.perf_counter())


async def hear(url: str, args: argparse.Namespace, sent: signal.Signals | None) -> tuple[list[Heard], float]:
    """All streams, with a signal to one rank while they speak; seconds until no rank of that gang was left."""
    all_heard = [Heard() for _ in range(args.streams)]
    noticed = 0.0
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [
            asyncio.ensure_future(listen(session, url, n, args.tokens, heard)) for n, heard in enumerate(all_heard)
        ]
        if sent is not None:
            while not all(len(heard.times) > args.tokens // 10 for heard in all_heard):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            gang = rank_pids()
            lost = max(gang)
            began = time.perf_counter()
            os.kill(lost, sent)
            while (gang - {lost}) & rank_pids() and time.perf_counter() < began + GONE_SECONDS:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            noticed = time.perf_counter() - began
            if any(stream.done() for stream in streams):
                raise SystemExit("a stream had ended before the rank was lost: ask for more --tokens")
        await asyncio.gather(*streams)
    return all_heard, noticed


def lose_ranks(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds by fault; `same` is whether every text was as without it."""
    expected, _ = asyncio.run(hear(url, args, None))
    found: dict[str, Any] = {}
    for name, sent in SIGNALS.items():
        trials = []
        for _ in range(args.repeat):
            heard, noticed = asyncio.run(hear(url, args, sent))
            same = [one.text == other.text for one, other in zip(heard, expected, strict=True)]
            trials.append({"noticed": noticed, "pause": max(one.pause for one in heard), "same": sum(same)})
            print(f"a rank {name}: {trials[-1]} of {args.streams} streams", flush=True)
        found[name] = {
            "trials": trials, "streams": args.streams, "tokens": args.tokens, "same": all(
                trial["same"] == args.streams for trial in trials
            ),
            **{what: workloads.spread([trial[what] for trial in trials]) for what in ("noticed", "pause")},
        }  # fmt: skip
    return found


def run_workloads(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures by workload."""
    target, console, rows = HttpTarget(url, None, decode=None), make_console(), {}
    for name in args.workload:
        runs = measure(
            {"gang": target}, lambda rep, name=name: make_work(name, rep=rep, divide=1, vocab=workloads.VOCAB),
            Pacing(), repeat=args.repeat, title=name, console=console,
        )  # fmt: skip
        rows[name] = summary(runs["gang"])
        middles = (f"{figure} {rows[name][figure]['median']:.4g}" for figure in FIGURES)
        print(f"tp={args.tp} {name} over HTTP: {', '.join(middles)}", flush=True)
    return rows


def write_model(folder: Path) -> None:
    """The 8B shape, with a tokenizer that has a text for every id."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    known.update({f"w{i}": i for i in range(len(known), workloads.VOCAB)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    (folder / "config.json").write_text(json.dumps(workloads.CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--step-timeout", type=float, default=2.0, help="seconds, with --faults")
    parser.add_argument("--workload", nargs="+", default=["W1", "W3"], choices=list(workloads.ALL))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="served-gang-"))
    config = ClusterConfig(http=HttpSection(port=free_port()))
    if args.faults:
        model = ModelSection(
            path="demo", tensor_parallel=args.tp, device=args.device, dtype="float32", step_timeout=args.step_timeout
        )
    else:
        write_model(folder)
        model = ModelSection(
            path=str(folder), tensor_parallel=args.tp, device=args.device, load_format="dummy", name="llama-8b"
        )
        config = config.model_copy(update={"engine": EngineSection(max_num_seqs=1024, max_num_batched_tokens=8192)})
    began = time.perf_counter()
    try:
        url = bring_up(config.model_copy(update={"model": model}), address=None, progress=print).base_url
        started = time.perf_counter() - began
        print(f"up after {started:.1f} s", flush=True)
        found = lose_ranks(url, args) if args.faults else run_workloads(url, args)
    finally:
        bring_down(own_ray=True)
        shutil.rmtree(folder)
    if args.json:
        document = {"command": " ".join(sys.argv), "versions": versions(), "seconds_to_start": started, "found": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.faults and not all(one["same"] for one in found.values()):
        raise SystemExit("a text was not the one of before")


if __name__ == "__main__":
    main()
