"""Beam search on a CUDA device: transformers' answers in fp32, with captured steps and without, alone and crowded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_demo_on_gpu import EOS, FOLDER, greedy, ours, prompts

from workers.api.request import BeamParams, EngineRequest, SamplingParams

OUT, WIDTH = 24, 4
ASKED = prompts()[::4]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).cuda().eval()
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(ASKED):
        given = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            rows = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=OUT, do_sample=False, num_beams=WIDTH,
                num_return_sequences=WIDTH, early_stopping="never", eos_token_id=EOS, pad_token_id=5,
            )  # fmt: skip
        for place, row in enumerate(rows[:, len(prompt) :].tolist()):
            found[f"s{i}/{place}"] = row[: row.index(EOS) + 1] if EOS in row else row
    return found


@pytest.mark.parametrize(
    "engine", [{}, {"cuda_graphs": False}, {"block_size": 64}, {"num_blocks": 60, "max_num_seqs": 12}]
)
def test_answers_are_those_of_transformers(engine: dict[str, Any], expected: dict[str, list[int]]) -> None:
    params = SamplingParams(OUT, temperature=0.0, stop_ids=(EOS,))
    searches = [EngineRequest(f"s{i}", p, params, beams=BeamParams(WIDTH)) for i, p in enumerate(ASKED)]
    got = ours("float32", [*searches, *greedy(ASKED)], **engine)
    assert {name: tokens for name, tokens in got.items() if name[0] == "s"} == expected
