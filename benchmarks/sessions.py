"""Sessions of /v1/chat/interactive over a block pool that holds few of them: exactness, and what rounds compute.

    python benchmarks/sessions.py [--sessions 200] [--rounds 3] [--room 20] [--json FILE]
    python benchmarks/sessions.py --serve
    python benchmarks/sessions.py --url http://HOST:PORT [--against http://HOST:PORT] [--model NAME]

Two fronts, a dispatcher and the demo model's engines, over real sockets, in one process: all of a cluster but Ray and
HAProxy. Each session's rounds go to both fronts in turn, half of them greedy, half with LMDeploy's sampling. Each
answer is compared with the one that an engine of its own, with room for all and without a prefix cache, gives to the
whole history as plain messages on /v1/chat/completions.

  interleaved: --sessions at once on one replica whose pool holds --room of them, in random order
  back at once: the next round follows while the blocks of the last are there; how many tokens it computes
  two replicas: as many sessions as both hold together; how many second rounds went where their blocks were

`--serve` runs the first of them against `echelon serve`, with Ray and HAProxy: two replicas that hold --room sessions
together, two ingresses; then another server, with room for all and without a prefix cache, is asked for each whole
history. `--url` asks servers that run already (`--against`: the one for whole histories; default: the same). Greedy
only, since the route takes no seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
from served_sessions import Served, serving

from router.cluster_status import ClusterStatus
from router.dispatch.client import DispatcherClient
from router.dispatch.config import DispatcherConfig
from router.dispatch.lease import Ended
from router.dispatch.server import DispatcherServer
from router.engine_link import EngineLinks
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.http.stories import Stories
from router.remote_histories import RemoteHistories
from router.sessions import Sessions
from router.text.tokenizer import Tokenizer
from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.replica import ReplicaInfo
from workers.rank import Rank
from workers.replica import EngineServer

MODEL = Path(__file__).resolve().parent.parent / "configs" / "demo-model"
SECRET = "benchmark"
BLOCK = 16
CONTEXT = 1024
TOKENS = 24  # of an answer, at most
SESSION_TOKENS = 28  # of a round with its prompt, about
GREEDY = {"temperature": 0, "top_p": 1, "top_k": -1}
SAMPLED = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}
FIRST = ("What is {a} + {b}?", "Count from {a} to {b}.", "What is the capital of France?", "Hi, I am number {a}.")
NEXT = ("And {a} + {b}?", "Say that again, please.", "Why?", "Now count to {b}.")


class Replica:
    """An engine in a thread of its own, behind a socket."""

    def __init__(self, name: str, blocks: int, *, prefix_caching: bool = True) -> None:
        engine = EngineConfig(
            block_size=BLOCK,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            num_blocks=blocks,
            prefix_caching=prefix_caching,
        )
        self.rank = Rank(
            ReplicaConfig(ModelConfig(str(MODEL), "demo", max_model_len=CONTEXT), engine, device="cpu"), threads=1
        )
        self.engine = self.rank.make_engine()
        self.server = EngineServer(
            self.engine, ReplicaInfo(name, "demo", "", 0, CONTEXT, 32, num_blocks=blocks, block_size=BLOCK), SECRET
        )
        self.info = self.server.start("127.0.0.1")
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Nothing is left running, and the books balance."""
        self.server.stop()
        self.thread.join()
        self.rank.close()
        self.engine.check_ledgers()


@dataclass
class Ends(Stories):
    """What each request had in the cache, by its id."""

    of: dict[str, Ended] = field(default_factory=dict)

    def ended(self, request: Ended) -> None:
        self.of[request.request_id] = request

    async def story(self, owner: str | None, request_id: str) -> bytes:
        return b""


class At(Protocol):
    """Where requests go."""

    async def post(self, front: int, path: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, whose id is `name`."""

    async def cached(self, name: str) -> int:
        """How many tokens of its prompt were in a prefix cache."""


@dataclass(frozen=True)
class Site:
    """Fronts over replicas."""

    fronts: Sequence[httpx.AsyncClient]
    ends: Ends
    replicas: Sequence[Replica]

    async def post(self, front: int, path: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """See `At`."""
        r = await self.fronts[front].post(path, json={"model": "demo", **body}, headers={"x-request-id": name})
        if r.status_code != 200:
            raise SystemExit(f"{path}: {r.status_code} {r.text}")
        answer: dict[str, Any] = r.json()
        return answer

    async def cached(self, name: str) -> int:
        """See `At`."""
        while name not in self.ends.of:  # noqa: ASYNC110 - it comes right after the answer
            await asyncio.sleep(0)
        return self.ends.of[name].cached_tokens


@asynccontextmanager
async def site(replicas: Sequence[Replica], fronts: int = 2) -> AsyncIterator[Site]:
    """Replicas, a dispatcher, fronts; all are closed at the end."""
    server = DispatcherServer(DispatcherConfig(recovery=0.0), secret=SECRET, rng=random.Random(0))
    address = await server.start()
    for replica in replicas:
        server.register(replica.info)

    async def locate() -> tuple[str, int]:
        return address

    ends, sessions, clients = Ends(), [], []
    for number in range(fronts):
        client = DispatcherClient(f"front-{number}", secret=SECRET, locate=locate)
        client.start()
        sessions.append(Sessions(client, EngineLinks(client.name, secret=SECRET)))
        while sum(r.state == "ready" for r in client.rows) < len(replicas):  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.01)
        app = create_app(
            FrontConfig(),
            [ServedModel("demo", Tokenizer.from_folder(MODEL, trust_template=True), CONTEXT)],
            sessions[-1],
            ClusterStatus(client),
            histories=RemoteHistories(client, ttl=3600.0, max_sessions=10_000),
            stories=ends,
            draw_seed=lambda: 7,
        )
        clients.append(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", timeout=600))
    yield Site(clients, ends, replicas)
    for http, one in zip(clients, sessions, strict=True):
        await http.aclose()
        await one.close()
    await server.close()
    for replica in replicas:
        replica.close()


@dataclass
class Talk:
    """One session: what was said, and of each round the prompt's tokens, those that are new, and those computed."""

    number: int
    rng: random.Random
    sampled: bool
    said: list[str] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    @property
    def sampling(self) -> dict[str, Any]:
        return SAMPLED if self.sampled else GREEDY

    def ask(self) -> str:
        a, b = self.rng.randrange(1, 50), self.rng.randrange(50, 99)
        return self.rng.choice(NEXT if self.said else FIRST).format(a=a, b=b)


async def play(at: At, talk: Talk) -> None:
    """Its next round, at the front whose turn it is."""
    text, count = talk.ask(), len(talk.prompts)
    name = f"t{talk.number}-{count}"
    body = {"prompt": text, "session_id": talk.number, "interactive_mode": True, "request_output_len": TOKENS}
    answer = await at.post(count % 2, "/v1/chat/interactive", name, {**body, **talk.sampling})
    talk.said += [text, answer["text"]]
    talk.prompts.append(answer["history_tokens"] + answer["input_tokens"])
    talk.own.append(answer["input_tokens"])
    talk.computed.append(talk.prompts[-1] - await at.cached(name))


async def differing(reference: At, talk: Talk) -> int:
    """How many of its answers are not those that the plain messages get."""
    wrong = 0
    for end in range(1, len(talk.said), 2):
        messages = [{"role": ("user", "assistant")[i % 2], "content": talk.said[i]} for i in range(end)]
        body = {"messages": messages, "max_tokens": TOKENS, **talk.sampling}
        answer = await reference.post(0, "/v1/chat/completions", f"r{talk.number}-{end}", body)
        wrong += answer["choices"][0]["message"]["content"] != talk.said[end]
    return wrong


async def interleaved(at: At, talks: Sequence[Talk], rounds: int, most: int = 16) -> None:
    """All rounds of all sessions in random order, up to `most` at once, one at a time in a session."""
    rng = random.Random(1)
    order = [talk for talk in talks for _ in range(rounds)]
    rng.shuffle(order)
    room, locks = asyncio.Semaphore(most), {talk.number: asyncio.Lock() for talk in talks}

    async def one(talk: Talk) -> None:
        async with room, locks[talk.number]:
            await play(at, talk)

    await asyncio.gather(*(one(talk) for talk in order))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):g} ({min(values):g}..{max(values):g}, n={len(values)})"


def made(first: int, count: int, *, greedy: bool = False) -> list[Talk]:
    return [Talk(n, random.Random(n), sampled=not (greedy or n % 2)) for n in range(first, first + count)]


async def equal(reference: At, talks: Sequence[Talk]) -> tuple[int, int]:
    """How many of the answers are the whole history's, and how many there are."""
    answers = sum(len(t.prompts) for t in talks)
    return answers - sum([await differing(reference, t) for t in talks]), answers


def told(talks: Sequence[Talk], reference: tuple[int, int]) -> dict[str, Any]:
    """What is known of the rounds after the first."""
    rounds = [(t.prompts[r], t.own[r], t.computed[r]) for t in talks for r in range(1, len(t.prompts))]
    return {
        "equal": reference[0],
        "answers": reference[1],
        "rounds": len(rounds),
        "prompt": [prompt for prompt, _, _ in rounds],
        "own": [own for _, own, _ in rounds],
        "computed": [computed for _, _, computed in rounds],
        "there": sum(computed <= own + BLOCK for _, own, computed in rounds),
    }


def show(name: str, f: dict[str, Any]) -> None:
    print(f"{name}: {f['equal']} of {f['answers']} answers equal the whole history's", flush=True)
    print(
        f"  later rounds: prompt {spread(f['prompt'])} tokens, new {spread(f['own'])}, computed {spread(f['computed'])}"
    )
    print(f"  {f['there']} of {f['rounds']} computed their own tokens and at most a block more;", end=" ")
    print(f"all together {100 * sum(f['computed']) / sum(f['prompt']):.0f} % of their prompts", flush=True)


async def over_http(args: argparse.Namespace, blocks: int, figures: dict[str, Any]) -> None:
    """The same sessions, interleaved, against servers."""
    talks = made(1, args.sessions, greedy=True)
    small = {"block_size": BLOCK, "max_num_seqs": 32, "max_num_batched_tokens": 512, "num_blocks": blocks // 2}
    whole = small | {"num_blocks": 4096, "prefix_caching": False}
    with serving(args.url, replicas=2, engine=small, fronts=2) as url:
        async with Served.at(url, args.model) as at:
            before = await at.executed()
            await interleaved(at, talks, args.rounds)
            figures["executed"] = await at.executed() - before
            figures["sessions held"] = await at.metric("echelon_sessions")
    with serving(args.against or args.url, replicas=1, engine=whole, fronts=1) as url:
        async with Served.at(url, args.model) as reference:
            figures["served"] = told(talks, await equal(reference, talks))
    prompts = sum(sum(talk.prompts) for talk in talks)
    show(f"over HTTP, {args.sessions} sessions", figures["served"])
    print(f"  histories held: {figures['sessions held']:g}; prompts {prompts} tokens, executed {figures['executed']:g}")


async def main(args: argparse.Namespace) -> None:
    blocks = args.room * -(-args.rounds * SESSION_TOKENS // BLOCK)
    figures: dict[str, Any] = {"sessions": args.sessions, "blocks": blocks, "block_size": BLOCK}
    if args.serve or args.url:
        await over_http(args, blocks, figures)
    else:
        await in_process(args, blocks, figures)
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")


async def in_process(args: argparse.Namespace, blocks: int, figures: dict[str, Any]) -> None:
    """All three runs, in this process."""
    async with site([Replica("alone", 4096, prefix_caching=False)], fronts=1) as reference:
        async with site([Replica("small", blocks)]) as at:
            talks = made(1, args.sessions)
            await interleaved(at, talks, args.rounds)
            whole = [t.prompts[-1] + TOKENS for t in talks]
            print(f"a session in the end: {spread(whole)} tokens; the pool: {blocks * BLOCK}")
            figures["interleaved"] = told(talks, await equal(reference, talks))
            show(f"interleaved, {args.sessions} sessions", figures["interleaved"])
            talks = made(10_001, args.room)
            for talk in talks:
                for _ in range(args.rounds):
                    await play(at, talk)
            figures["back at once"] = told(talks, await equal(reference, talks))
            show("back at once", figures["back at once"])
        async with site([Replica(f"r{n}", blocks) for n in range(2)]) as at:
            talks = made(20_001, args.room)
            await interleaved(at, talks, 2, most=4)
            figures["two replicas"] = told(talks, await equal(reference, talks))
            show("two replicas", figures["two replicas"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--room", type=int, default=20, help="sessions that the pool holds")
    parser.add_argument("--serve", action="store_true", help="start servers, and ask them")
    parser.add_argument("--url", help="ask this server, as it is")
    parser.add_argument("--against", help="ask this one for answers to whole histories (default: that of --url)")
    parser.add_argument("--model", default="demo", help="its name there")
    parser.add_argument("--json", type=Path)
    asyncio.run(main(parser.parse_args()))
