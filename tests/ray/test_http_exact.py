"""Over HTTP the demo model says what transformers says: prompts one by one and 64 at a time, streamed and not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
REFERENCE = json.loads((ROOT / "tests" / "workers" / "demo_reference.json").read_text())
TOKENIZER = tokenizers.Tokenizer.from_file(str(ROOT / "configs" / "demo-model" / "tokenizer.json"))

Answer = tuple[str, int, str | None]


def expected(index: int) -> Answer:
    ids = REFERENCE["answers"][index]
    return TOKENIZER.decode(ids, skip_special_tokens=True), len(ids), "stop" if ids[-1] == 1 else "length"


async def ask(client: openai.AsyncOpenAI, index: int, *, stream: bool) -> Answer:
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": REFERENCE["prompts"][index],
        "max_tokens": REFERENCE["max_new"],
        "temperature": 0,
    }
    if not stream:
        whole = await client.completions.create(**body)
        assert whole.usage is not None
        return whole.choices[0].text, whole.usage.completion_tokens, whole.choices[0].finish_reason
    text, count, finish = "", 0, None
    async for chunk in await client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        count = chunk.usage.completion_tokens if chunk.usage else count
        for choice in chunk.choices:
            text += choice.text
            finish = choice.finish_reason or finish
    return text, count, finish


def run(base_url: str, count: int, *, at_once: int, stream: bool) -> dict[int, tuple[Answer, Answer]]:
    """What differs: index -> (ours, theirs)."""

    async def main() -> list[Answer]:
        gate = asyncio.Semaphore(at_once)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

            async def one(index: int) -> Answer:
                async with gate:
                    return await ask(client, index, stream=stream)

            return await asyncio.gather(*(one(i) for i in range(count)))

    answers = asyncio.run(main())
    return {i: (a, expected(i)) for i, a in enumerate(answers) if a != expected(i)}


@pytest.mark.parametrize(("count", "at_once", "stream"), [(60, 1, False), (200, 64, False), (200, 64, True)])
def test_prompts_over_http(cluster: Any, count: int, at_once: int, stream: bool) -> None:
    assert run(cluster.base_url, count, at_once=at_once, stream=stream) == {}
