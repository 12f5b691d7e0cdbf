"""What text costs the front: chat templates in and out of process, prompts, and every token of an answer.

    python benchmarks/front_text.py [render] [encode] [stream]

Medians of `--rounds` rounds, with least and greatest in brackets; the demo model's tokenizer and template.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from router.generation import ChoiceDelta
from router.http.choice import Choice
from router.http.job import Job
from router.http.reading import Reading
from router.metrics import Metrics
from router.protocol.answers import ChatFormat
from router.text.offload import TextPool
from router.text.rendering import DirectRenderer, Renderer
from router.text.template_pool import TemplatePool
from router.text.templates import ChatTemplate, Conversation
from router.text.tokenizer import Tokenizer
from workers.api.request import Delta

FOLDER = Path(__file__).parents[1] / "configs" / "demo-model"
QUESTION = "What is 3 + 4? And what is the capital of France? "
CHAT = Conversation(
    [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": QUESTION * 4},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": QUESTION},
    ]
)


def shown(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3f} {unit} ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


async def latencies(renderer: Renderer, count: int, at_once: int) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds, and conversations a second."""
    took: list[float] = []

    async def client() -> None:
        for _ in range(count // at_once):
            start = time.perf_counter()
            await renderer.render(CHAT)
            took.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    rate = len(took) / (time.perf_counter() - start)
    took.sort()
    return took[len(took) // 2] * 1e3, took[len(took) * 99 // 100] * 1e3, rate


async def render(rounds: int) -> None:
    source = (FOLDER / "chat_template.jinja").read_text()
    pool, direct = TemplatePool(source, {}), DirectRenderer(ChatTemplate(source, {}))
    start = time.perf_counter()
    pool.start()
    print(f"start() {1e3 * (time.perf_counter() - start):.1f} ms", end="; ")
    await pool.render(CHAT)
    print(f"first prompt after {1e3 * (time.perf_counter() - start):.0f} ms")
    for at_once in (1, 64):
        found: dict[str, list[tuple[float, float, float]]] = {"processes": [], "in process": []}
        for _ in range(rounds):
            found["processes"].append(await latencies(pool, 3200, at_once))
            found["in process"].append(await latencies(direct, 3200, at_once))
        for name, rows in found.items():
            p50, p99, rate = (list(column) for column in zip(*rows, strict=True))
            print(f"{at_once:2} at once, {name}: p50 {shown(p50, 'ms')}, p99 {shown(p99, 'ms')}, {shown(rate, '/s')}")
    pool.close()


async def encode(rounds: int) -> None:
    tokenizer = Tokenizer.from_folder(FOLDER, trust_template=True)
    assert tokenizer.chat is not None
    texts = TextPool(1)
    for characters in (200, 2_000, 20_000, 1_000_000):
        text = (QUESTION * (characters // len(QUESTION) + 1))[:characters]
        chat = Conversation([{"role": "user", "content": text}])
        times, gaps = [], []
        for _ in range(rounds):
            start = last = time.perf_counter()
            work, gap = asyncio.create_task(tokenizer.chat.encode(chat, texts)), 0.0
            while not work.done():
                await asyncio.sleep(0)
                now = time.perf_counter()
                gap, last = max(gap, now - last), now
            times.append((last - start) * 1e3)
            gaps.append(gap * 1e3)
        print(f"{characters:7} characters: {shown(times, 'ms')}; longest turn of the loop {shown(gaps, 'ms')}")
    texts.close()


def stream(rounds: int) -> None:
    """Microseconds of CPU time a token, one token a step, as in an answer to one client."""
    tokenizer = Tokenizer.from_folder(FOLDER, trust_template=True)
    ids = tokenizer.encode(QUESTION * 40) * 10
    form = ChatFormat("chatcmpl-0", 0, "demo", tokenizer.token_bytes)
    deltas = [Delta("r", i, (token,)) for i, token in enumerate(ids)]

    items = [ChoiceDelta(0, delta) for delta in deltas]

    def detokenize() -> None:
        push = tokenizer.detokenizer().push
        for token in ids:
            push((token,))

    def choice(stops: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            push = Choice(0, tokenizer.detokenizer(), stops=stops).push
            for delta in deltas:
                push(delta)

        return run

    def events() -> None:
        text = form.text
        for _ in ids:
            text(0, " the", None)

    def plain_json() -> None:
        for _ in ids:
            json.dumps({"choices": [{"index": 0, "delta": {"content": " the"}}]})

    def reading() -> None:
        meter = Metrics().request("demo", "", "default", 10)
        job = Job("demo", (), [Choice(0, tokenizer.detokenizer())], form, True, False, False)
        push = Reading(job, meter).push
        for item in items:
            push(item)

    for name, work in (
        ("detokenizer", detokenize),
        ("choice (detokenizer, positions)", choice(())),
        ("choice with two stop strings", choice(("\n\nQ:", "zzz"))),
        ("reading (choice, metrics)", reading),
        ("event", events),
        ("a dict through json, for comparison", plain_json),
    ):
        took = []
        for _ in range(rounds):
            start = time.thread_time()
            work()
            took.append((time.thread_time() - start) / len(ids) * 1e6)
        print(f"{name}: {shown(took, 'us')} a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=["render", "encode", "stream"], default=["render", "encode", "stream"]
    )
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for part in arguments.parts:
        print(f"-- {part}")
        if part == "stream":
            stream(arguments.rounds)
        else:
            asyncio.run((render if part == "render" else encode)(arguments.rounds))


if __name__ == "__main__":
    main()
