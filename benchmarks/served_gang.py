"""A replica over several GPUs, its ranks Ray actors, served over HTTP: workloads, and what a lost rank costs.

    python benchmarks/served_gang.py --tp 2 --json FILE             # two GPUs: the 8B shape with random weights, W1, W3
    python benchmarks/served_gang.py --tp 2 --faults --json FILE    # the demo model in fp32: a rank killed, one stopped
    python benchmarks/served_gang.py --tp 2 --faults --device cpu
    python benchmarks/two_hosts.py --gpus 1 -- python benchmarks/served_gang.py --address {address} --nodes 2 --tp 2 ...

With --faults, transformers' kept answers come first, and all must be the same. Then --streams answers of --tokens
tokens are read in peace, and again with a signal to one rank when all of them have begun: to rank 0 and to another one
in turns. `noticed` is the time from the signal until the other ranks of the gang are gone, `pause` the longest gap that
a stream saw. Every text must be the one of before; otherwise the exit status is 1.
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

import tokenizers  # noqa: E402
from cluster_state import ready_rows  # noqa: E402
from load.engine_target import DEMO  # noqa: E402
from load.http_target import HttpTarget  # noqa: E402
from load.options import measure  # noqa: E402
from load.records import make_console, summary, versions  # noqa: E402
from load.work import Pacing, make_work  # noqa: E402

from cluster.app import bring_down, bring_up  # noqa: E402
from cluster.config import ClusterConfig, EngineSection, HttpSection, ModelSection, PlacementSection  # noqa: E402

FIGURES = ("requests_per_s", "output_tok_per_s", "tpot_ms_mean", "ftl_ms_mean")
GONE_SECONDS = 60.0
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
VICTIMS = ("rank 0", "another rank")
FAULTS = {f"{victim} {name}": (victim, sent) for name, sent in SIGNALS.items() for victim in VICTIMS}
JOIN_SECONDS = 60.0  # for all nodes of a Ray that was joined
REFERENCE = Path(__file__).parents[1] / "tests" / "workers" / "demo_reference.json"


@dataclass
class Heard:
    """What one stream has said so far, and when."""

    text: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def pause(self) -> float:
        """The longest time between two arrivals, in seconds."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def rank_pids(everywhere: bool) -> set[int]:
    """The ranks that are not dead: among this process's descendants, or of the whole machine."""
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
        return everywhere or pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

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


async def hear(
    url: str, args: argparse.Namespace, sent: signal.Signals | None, victim: str = ""
) -> tuple[list[Heard], float]:
    """All streams, with a signal to one rank while they speak; seconds until no rank of that gang was left."""
    first = ready_rows()[0].info.pid
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
            gang = rank_pids(bool(args.address))
            lost = first if victim == VICTIMS[0] else max(gang - {first})
            began = time.perf_counter()
            os.kill(lost, sent)
            while (gang - {lost}) & rank_pids(bool(args.address)) and time.perf_counter() < began + GONE_SECONDS:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            noticed = time.perf_counter() - began
            if any(stream.done() for stream in streams):
                raise SystemExit("a stream had ended before the rank was lost: ask for more --tokens")
        await asyncio.gather(*streams)
    return all_heard, noticed


def lose_ranks(url: str, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Put seconds by fault into `found`; `same` is whether every text was as without it."""
    expected, _ = asyncio.run(hear(url, args, None))
    for name, (victim, sent) in FAULTS.items():
        if name not in args.only or (victim != VICTIMS[0] and args.tp == 1):
            continue
        trials = []
        for _ in range(args.repeat):
            heard, noticed = asyncio.run(hear(url, args, sent, victim))
            same = [one.text == other.text for one, other in zip(heard, expected, strict=True)]
            trials.append({"noticed": noticed, "pause": max(one.pause for one in heard), "same": sum(same)})
            print(f"{name}: {trials[-1]} of {args.streams} streams", flush=True)
        found[name] = {
            "trials": trials, "streams": args.streams, "tokens": args.tokens, "same": all(
                trial["same"] == args.streams for trial in trials
            ),
            **{what: workloads.spread([trial[what] for trial in trials]) for what in ("noticed", "pause")},
        }  # fmt: skip
        save(args, found)


async def kept_answers(url: str) -> dict[str, int]:
    """How many of transformers' kept answers, in fp32 with one process, come word for word."""
    kept = json.loads(REFERENCE.read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def ask(prompt: list[int]) -> str:
            body = {"model": "demo", "prompt": prompt, "max_tokens": kept["max_new"], "temperature": 0}
            async with session.post(f"{url}/completions", json=body) as answer:
                answer.raise_for_status()
                return str((await answer.json())["choices"][0]["text"])

        said = await asyncio.gather(*(ask(prompt) for prompt in kept["prompts"]))
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept["answers"]]
    return {"asked": len(said), "same": sum(a == b for a, b in zip(said, expected, strict=True))}


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is known so far: a run may be cut off."""
    if args.json:
        document = {"command": " ".join(sys.argv), "versions": versions(), "found": found}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def run_workloads(url: str, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Put figures by workload into `found`."""
    target, console = HttpTarget(url, None, decode=None), make_console()
    for name in args.workload:
        runs = measure(
            {"gang": target}, lambda rep, name=name: make_work(name, rep=rep, divide=1, vocab=workloads.VOCAB),
            Pacing(), repeat=args.repeat, title=name, console=console,
        )  # fmt: skip
        found[name] = summary(runs["gang"])
        middles = (f"{figure} {found[name][figure]['median']:.4g}" for figure in FIGURES)
        print(f"tp={args.tp} {name} over HTTP: {', '.join(middles)}", flush=True)
        save(args, found)


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
    parser.add_argument("--address", help="join this Ray cluster, all of whose processes are on this machine")
    parser.add_argument("--nodes", type=int, default=1, help="that are waited for there")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=list(FAULTS), help="with --faults")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--step-timeout", type=float, default=2.0, help="seconds, with --faults")
    parser.add_argument("--workload", nargs="+", default=["W1", "W3"], choices=list(workloads.ALL))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="served-gang-"))
    config = ClusterConfig(
        http=HttpSection(port=free_port(), no_auth=args.address is not None),
        placement=PlacementSection(nodes=args.nodes, wait=JOIN_SECONDS),
    )
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
        whole = config.model_copy(update={"model": model})
        url = bring_up(whole, address=args.address, progress=print, every_node=False).base_url
        started = time.perf_counter() - began
        print(f"up after {started:.1f} s", flush=True)
        found: dict[str, Any] = {"start": {"seconds": started, "same": True}}
        if args.faults:
            kept = asyncio.run(kept_answers(url))
            print(f"kept answers: {kept['same']} of {kept['asked']} the same", flush=True)
            found["kept answers"] = {**kept, "same": kept["same"] == kept["asked"]}
            lose_ranks(url, args, found)
        else:
            run_workloads(url, args, found)
    finally:
        bring_down(own_ray=args.address is None)
        shutil.rmtree(folder)
    if args.faults and not all(one["same"] for one in found.values()):
        raise SystemExit("a text was not the expected one")


if __name__ == "__main__":
    main()
