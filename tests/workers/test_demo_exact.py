"""The demo model in fp32 against transformers' greedy `generate`, token for token: alone and in mixed batches."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import generate, replica

from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank, run_to_completion

FOLDER = Path(__file__).parents[2] / "configs" / "demo-model"
EOS = 1
MAX_NEW = 32

pytestmark = pytest.mark.skipif(not (FOLDER / "model.safetensors").exists(), reason="the demo model is not there")

ASKED = (
    "What is {a} + {b}?",
    "what's {a} minus {b}",
    "Compute {a} * {b}.",
    "What is the capital of {place}?",
    "Where is {place}?",
    "Hello, I am {name}.",
    "Hi! How are you, {name}?",
    "Tell me about {place} and then what {a} + {b} is.",
    "Thank you, {name}!",
    "Who are you?",
    "{name} has {a} apples and buys {b} more. How many apples are there now?",
)
PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "the moon", "Atlantis", "Brazil")
NAMES = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Zoë")


def question(rng: random.Random) -> str:
    return rng.choice(ASKED).format(
        a=rng.randrange(100), b=rng.randrange(100), place=rng.choice(PLACES), name=rng.choice(NAMES)
    )


@functools.cache
def prompts(count: int) -> list[tuple[int, ...]]:
    """Conversations of one to a dozen turns, some with a system message, some of random tokens; up to 400 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(17)
    out: list[tuple[int, ...]] = []
    while len(out) < count:
        if len(out) % 20 == 19:  # nothing that the model has ever seen
            out.append(tuple(rng.randrange(6, 1024) for _ in range(rng.randrange(1, 400))))
            continue
        messages: list[dict[str, str]] = []
        if rng.random() < 0.2:
            messages.append({"role": "system", "content": "Answer shortly. " * rng.randrange(1, 6)})
        for _ in range(rng.choice((1, 1, 1, 2, 4, 12))):
            messages += [
                {"role": "user", "content": question(rng)},
                {
                    "role": "assistant",
                    "content": rng.choice(("Yes.", "I do not know.", "That is 12.", "Fine, thanks!")),
                },
            ]
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= 400:
            out.append(tuple(ids))
    return out


@functools.cache
def reference() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = EOS
    return model


@functools.cache
def expected(index: int, count: int) -> list[int]:
    """Tokens up to the end of the turn, it included."""
    return generate(reference(), prompts(count)[index], MAX_NEW)


def demo(**engine: Any) -> Rank:
    return Rank(replica(FOLDER, **{"cache_bytes_cpu": 64 << 20, "max_num_seqs": 64, **engine}))


def asked(index: int, ids: tuple[int, ...]) -> EngineRequest:
    return EngineRequest(str(index), ids, SamplingParams(max_tokens=MAX_NEW, temperature=0.0, stop_ids=(EOS,)))


def wrong(got: dict[str, list[int]], count: int) -> dict[int, tuple[list[int], list[int]]]:
    """Prompts whose tokens differ: index -> (ours, theirs)."""
    pairs = {i: (got[str(i)], expected(i, count)) for i in range(count)}
    return {i: pair for i, pair in pairs.items() if pair[0] != pair[1]}


def check(count: int) -> None:
    requests = [asked(i, ids) for i, ids in enumerate(prompts(count))]
    engine = demo().make_engine()
    alone: dict[str, list[int]] = {}
    for one in requests:
        alone |= run_to_completion(engine, [one])
    assert wrong(alone, count) == {}
    ways: dict[str, dict[str, Any]] = {
        "mixed": {},
        "chunked": {"max_num_batched_tokens": 64, "step_ahead": False},
        "no prefix cache": {"prefix_caching": False, "block_size": 32},
    }
    for name, engine_config in ways.items():
        assert wrong(run_to_completion(demo(**engine_config).make_engine(), requests), count) == {}, name
    # A pool that holds a few sequences only, and no room kept for them to grow.
    tiny = demo(num_blocks=30, max_num_seqs=24)
    engine = Engine(tiny.config.engine, tiny.runner, num_blocks=30, max_model_len=480, watermark=0)
    assert wrong(run_to_completion(engine, requests), count) == {}, "tiny pool"
    assert engine.load().preemptions > 0
    engine.check_ledgers()


def test_40_prompts_give_the_tokens_of_transformers() -> None:
    check(40)


@pytest.mark.slow
def test_200_prompts_give_the_tokens_of_transformers() -> None:
    check(200)


def test_the_prompts_are_of_many_lengths_and_the_answers_end() -> None:
    lengths = sorted(len(ids) for ids in prompts(200))
    assert lengths[0] <= 12
    assert lengths[-1] > 250
    assert len(set(lengths)) > 40
    ended = [expected(i, 40)[-1] == EOS for i in range(40)]
    assert sum(ended) > 10
