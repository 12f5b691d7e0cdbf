"""Structured output on a CUDA device: masks come behind the forward pass, in replayed and in launched steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, SamplingParams
from workers.execution.graphs import CapturedStep
from workers.rank import Rank, run_to_completion

sys.path.append(str(Path(__file__).parents[1] / "workers"))  # the demo model's prompts
from demo_reference import FOLDER, prompts

pytest.importorskip("llguidance", reason="structured output needs llguidance, which is not installed here")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

END = 1
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 10, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["id", "tags", "note"],
    "additionalProperties": False,
}
OBJECT = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
WORDS = GrammarSpec(GrammarKind.REGEX, "[a-z]{3,8}( [a-z]{3,8}){2}")


def mixed(temperature: float) -> list[EngineRequest]:
    """Objects, words and plain answers, side by side."""
    asked = []
    for i, ids in enumerate(prompts()[:24]):
        grammar = (OBJECT, WORDS, None)[i % 3]
        params = SamplingParams(80, temperature=temperature, seed=i, stop_ids=(END,), min_tokens=(0, 0, 2)[i % 3])
        asked.append(EngineRequest(f"{i}", tuple(ids), params, grammar=grammar))
    return asked


def run(temperature: float, device: str = "cuda", **engine: Any) -> dict[str, list[int]]:
    limits = {"num_blocks": 1024, "max_num_seqs": 32, **engine}
    rank = Rank(ReplicaConfig(ModelConfig(str(FOLDER), "demo", dtype="float32"), EngineConfig(**limits), device=device))
    made = rank.make_engine()
    tokens = run_to_completion(made, mixed(temperature))
    made.check_ledgers()
    rank.close()
    return tokens


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of every replayed step."""
    seen: list[int] = []
    replay = CapturedStep.replay

    def counting(self: CapturedStep, flat: Any) -> None:
        seen.append(flat.num_tokens)
        replay(self, flat)

    monkeypatch.setattr(CapturedStep, "replay", counting)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_replayed_launched_and_one_at_a_time_are_the_same_and_valid(replays: list[int], temperature: float) -> None:
    import tokenizers

    text = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    replayed = run(temperature)
    assert len(replays) > 20, "steps with masks are replayed from graphs, too"
    assert run(temperature, cuda_graphs=False) == replayed
    assert run(temperature, step_ahead=False) == replayed
    for name, ids in replayed.items():
        if int(name) % 3 == 0:
            value = json.loads(text.decode(ids))
            assert 10 <= value["id"] <= 99
            assert len(value["note"]) <= 12
            assert set(value["tags"]) <= {"red", "green", "blue"}
            assert ids[-1] == END


def test_the_same_tokens_as_on_the_cpu() -> None:
    """Greedy, fp32: what is allowed is the same, and the best of it nearly always (ties within rounding aside)."""
    on_gpu, on_cpu = run(0.0), run(0.0, device="cpu")
    same = sum(on_gpu[name] == on_cpu[name] for name in on_gpu)
    assert same >= len(on_gpu) - 2
