"""The answer does not depend on the schedule."""

from __future__ import annotations

import random

import pytest
from engine_runs import Harness, request
from fake_executor import VOCAB, oracle

from workers.api.request import EngineRequest, FinishReason


def requests(count: int, seed: int) -> list[EngineRequest]:
    """Some with common prefixes, some that stop by id, some by length, some resumed."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(24)]
    made = []
    for i in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        prompt = shared[: rng.choice([0, 8, 23, 24])] + own
        made.append(
            request(
                f"r{i}",
                prompt,
                rng.randint(1, 30),
                seed=rng.choice([0, i]),
                stop_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 3]))),
                min_tokens=rng.choice([0, 5]),
                logprobs=rng.choice([None, 0]),
            )
        )
    return made


VARIANTS = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "wide": {"max_num_batched_tokens": 512},
    "chunks of a few": {"max_num_seqs": 3, "max_num_batched_tokens": 3},
    "no prefix cache": {"prefix_caching": False},
    "tiny pool": {"num_blocks": 20, "watermark": 0},
    "tiny pool, no prefix cache": {"num_blocks": 20, "watermark": 0, "prefix_caching": False},
    "block size 1": {"block_size": 1, "num_blocks": 80, "watermark": 0},
}


@pytest.mark.parametrize("step_ahead", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_equal_the_oracle(variant: str, step_ahead: bool) -> None:
    harness = Harness(**{**VARIANTS[variant], "step_ahead": step_ahead, "max_model_len": 74})
    asked = requests(40, seed=7)
    harness.submit(*asked)
    harness.drain()
    for one in asked:
        tokens, reason = oracle(one, harness.engine.max_model_len)
        assert (harness.receiver.tokens[one.id], harness.receiver.finish(one.id)) == (tokens, reason), one.id
    stats = harness.engine.stats
    if "tiny" in variant:
        assert stats.preemptions > 0
    if variant == "batched":
        assert stats.prefix_hits > 0
    reasons = {harness.receiver.finish(one.id) for one in asked}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
