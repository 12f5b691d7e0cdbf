"""The start of a rank: an advice that can be followed, and time that is accounted for."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

import pytest
from tiny import checkpoint, prompt, replica, request

from workers.api.errors import OutOfMemory
from workers.rank import Rank, run_to_completion


def test_what_the_message_says_would_fit_does_fit() -> None:
    config = replica(checkpoint("llama"), cache_bytes_cpu=60_000)
    with pytest.raises(OutOfMemory) as refused:
        Rank(config)
    found = re.search(r"max_model_len to at most (\d+)", str(refused.value))
    assert found is not None
    fits = int(found[1])
    assert 16 <= fits < 256
    rank = Rank(replace(config, model=replace(config.model, max_model_len=fits)))
    assert rank.max_model_len == fits
    asked = request("whole", prompt(fits - 8))
    assert len(run_to_completion(rank.make_engine(), [asked])["whole"]) == 8
    with pytest.raises(OutOfMemory):
        Rank(replace(config, model=replace(config.model, max_model_len=fits + 1)))


def test_the_log_accounts_for_the_seconds_of_a_start(caplog: pytest.LogCaptureFixture) -> None:
    config = replica(checkpoint("qwen3"))
    started = time.perf_counter()
    with caplog.at_level(logging.INFO, logger="echelon.rank"):
        rank = Rank(config, rank=0)
    total = time.perf_counter() - started
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rank 0: tiny on cpu in float32")]
    logged = dict(re.findall(r"(\w+) (\d+\.\d\d) s", line))
    assert {name: f"{seconds:.2f}" for name, seconds in rank.phases.items()} == logged
    assert list(logged) == ["config", "weights", "cache", "warmup", "grammars"]
    assert 0 < sum(rank.phases.values()) <= total
    assert f"{rank.num_blocks} KV blocks" in line
