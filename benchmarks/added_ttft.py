"""What front, dispatcher and channel add to the first token: a fake replica answers a sequence the moment it comes.

    python benchmarks/added_ttft.py [--alone 400] [--streams 64] [--each 12]

Four processes as in a cluster, over real connections: client, front (uvicorn on uvloop, tokenizing, sessions),
dispatcher, replica. The replica makes a sequence's first token at once, in process it would be there in microseconds:
all of the time to the first event with text has been added. First requests one at a time, then --streams connections
that play --each chats after each other, of 20 to 60 tokens every 20 ms, all at once at the beginning. HAProxy and Serve
are not in it: `http_share.py` has them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
import uvloop
from stream_client import Round, play, post

from router.cluster_status import ClusterStatus
from router.dispatch.client import DispatcherClient
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.server import DispatcherServer
from router.engine_link import EngineLinks
from router.http.app import create_app
from router.http.config import FrontConfig, ServedModel
from router.sessions import Sessions
from router.text.tokenizer import Tokenizer
from workers.api.channel import Channel, listen
from workers.api.replica import LoadReport, ReplicaInfo
from workers.api.request import Delta, EngineRequest, FinishReason
from workers.api.wire import ENGINE_CODEC, Abort, StepFrame, Submit, Welcome

MODEL = Path(__file__).resolve().parent.parent / "configs" / "demo-model"
SECRET = "benchmark"
STEP_SECONDS = 0.02
SLOTS = 256
ANSWER = "The capital of France is Paris, and 3 + 4 is 7. One, two, three; then a pause.\n"


@dataclass
class Replica:
    """Speaks for an engine. Every sequence gets the tokens of `script`, one a step, the first one at once."""

    script: list[int]
    info: ReplicaInfo | None = None
    channels: set[Channel] = field(default_factory=set)
    sequences: dict[str, tuple[EngineRequest, Channel, int]] = field(default_factory=dict)
    steps: int = 0

    def load(self) -> LoadReport:
        return LoadReport(
            step=self.steps, step_seconds=STEP_SECONDS, decode_tokens=len(self.sequences), running=len(self.sequences),
            free_blocks=4096, total_blocks=4096,
        )  # fmt: skip

    def opened(self, channel: Channel) -> None:
        assert self.info is not None
        self.channels.add(channel)
        channel.send(Welcome(self.info))

    def received(self, channel: Channel, message: object) -> None:
        if isinstance(message, Submit):
            for request in message.requests:
                self.sequences[request.id] = request, channel, 0
            self.step([r.id for r in message.requests])
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self.sequences.pop(request_id, None)

    def closed(self, channel: Channel, reason: str) -> None:
        self.channels.discard(channel)

    def step(self, ids: list[str]) -> None:
        """One token for each of `ids`."""
        self.steps += 1
        deltas: dict[Channel, list[Delta]] = {c: [] for c in self.channels if c.peer.startswith("observer")}
        for i in ids:
            request, channel, at = self.sequences[i]
            end = FinishReason.LENGTH if at + 1 == request.sampling.max_tokens else None
            deltas.setdefault(channel, []).append(Delta(i, at, (self.script[at % len(self.script)],), finish=end))
            self.sequences[i] = request, channel, at + 1
            if end is not None:
                del self.sequences[i]
        for channel, made in deltas.items():
            channel.send(StepFrame(tuple(made), self.load()))


def replica(pipe: Connection) -> None:
    async def main() -> None:
        engine = Replica(Tokenizer.from_folder(MODEL).encode(ANSWER))
        listener = await listen("127.0.0.1", 0, codec=ENGINE_CODEC, secret=SECRET, handler=engine)
        engine.info = ReplicaInfo(
            "fake", "demo", "127.0.0.1", listener.port, 4096, SLOTS, num_blocks=4096, block_size=16
        )
        pipe.send(engine.info)
        ended = asyncio.create_task(asyncio.to_thread(pipe.recv))
        while not ended.done():
            await asyncio.sleep(STEP_SECONDS)
            engine.step(list(engine.sequences))

    uvloop.run(main())


def dispatcher(pipe: Connection) -> None:
    async def main() -> None:
        server = DispatcherServer(DispatcherConfig(recovery=0.0), secret=SECRET, rng=random.Random(0))
        address = await server.start()
        server.register(pipe.recv())
        pipe.send(address)
        await asyncio.to_thread(pipe.recv)
        await server.close()

    uvloop.run(main())


def front(pipe: Connection) -> None:
    """Tells its port, then its CPU seconds when asked."""

    async def main() -> None:
        address = pipe.recv()

        async def locate() -> tuple[str, int]:
            return address

        client = DispatcherClient("front-1", secret=SECRET, locate=locate)
        client.start()
        sessions = Sessions(client, EngineLinks("front-1", secret=SECRET))
        model = ServedModel("demo", Tokenizer.from_folder(MODEL, trust_template=True), 4096)
        app = create_app(FrontConfig(), [model], sessions, ClusterStatus(client))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started and any(r.state == "ready" for r in client.rows)):  # noqa: ASYNC110 - no event for both
            await asyncio.sleep(0.01)
        pipe.send(listener.getsockname()[1])
        while (await asyncio.to_thread(pipe.recv)) == "cpu":
            pipe.send(time.process_time())
        server.should_exit = True
        await task
        await sessions.close()

    uvloop.run(main())


def started(target: Callable[[Connection], None], told: Any = None) -> tuple[Any, Connection, Any]:
    """A running process, the pipe to it, what it says once it is ready."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs,), daemon=True)
    process.start()
    if told is not None:
        ours.send(told)
    return process, ours, ours.recv()


def chat(tokens: int) -> bytes:
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    body = {"model": "demo", "messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    return post("/v1/chat/completions", body)


def shown(name: str, played: Round) -> str:
    took = sorted((s.first_text - s.began) * 1e3 for s in played.streams)
    p50, p99 = statistics.median(took), took[len(took) * 99 // 100]
    return (
        f"{name}: first token after p50 {p50:.2f} ms, p99 {p99:.2f} ms ({took[0]:.2f} to {took[-1]:.2f}, n={len(took)})"
    )


async def main(args: argparse.Namespace) -> None:
    engine, engine_pipe, info = started(replica)
    central, central_pipe, address = started(dispatcher, info)
    ingress, ingress_pipe, port = started(front, address)
    rng = random.Random(0)
    await play("127.0.0.1", port, [[chat(2)] * 20])  # warms up
    print(shown("one at a time", await play("127.0.0.1", port, [[chat(2)] * args.alone])))
    connections = [[chat(rng.randint(20, 60)) for _ in range(args.each)] for _ in range(args.streams)]
    ingress_pipe.send("cpu")
    before = ingress_pipe.recv()
    played = await play("127.0.0.1", port, connections)
    ingress_pipe.send("cpu")
    cpu = (ingress_pipe.recv() - before) / played.events * 1e6
    print(shown(f"{args.streams} at once", played))
    print(f"    {played.rate:,.0f} events/s, {cpu:.1f} us of the front's CPU time an event, requests included")
    for process, pipe in ((ingress, ingress_pipe), (central, central_pipe), (engine, engine_pipe)):
        pipe.send("end")
        process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int, default=400)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--each", type=int, default=12)
    uvloop.run(main(parser.parse_args()))
