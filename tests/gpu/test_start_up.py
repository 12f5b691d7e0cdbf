"""Once a rank has started, no request waits for the compiler, whatever steps it brings about."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.rank import Rank, run_to_completion

FOLDER = Path(__file__).parents[2] / "configs" / "demo-model"
# (prompts, tokens of each, tokens out): steps that are captured and steps that are not, few sequences and many
LOADS = ((1, 5, 3), (1, 400, 2), (3, 390, 2), (200, 3, 4), (17, 90, 3), (65, 33, 2), (130, 17, 6), (9, 200, 9))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_nothing_is_compiled_after_the_start(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = EngineConfig(max_num_seqs=200, max_num_batched_tokens=2048, num_blocks=8192, cuda_graphs=cuda_graphs)
    rank = Rank(ReplicaConfig(ModelConfig(str(FOLDER), "demo", dtype="bfloat16"), limits, device="cuda"))
    compiled: list[str] = []

    def note(**kernel: Any) -> None:
        compiled.append(kernel["repr"])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    rng = random.Random(2)
    for load, (count, tokens, out) in enumerate(LOADS):
        asked = []
        for i in range(count):
            prompt = tuple(rng.randrange(10, 1000) for _ in range(tokens))
            drawn = SamplingParams(out, temperature=1.0, top_p=0.9, presence_penalty=0.3, logprobs=2, seed=i)
            asked.append(EngineRequest(f"{load}-{i}", prompt, drawn if i % 5 == 1 else SamplingParams(out, 0.0)))
        engine = rank.make_engine()
        run_to_completion(engine, asked)
        engine.check_ledgers()
    assert compiled == []
    rank.close()
