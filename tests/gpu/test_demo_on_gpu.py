"""The demo model on a CUDA device against transformers on the same device: fp32 exactly, bf16 within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.rank import Rank, run_to_completion

FOLDER = Path(__file__).parents[2] / "configs" / "demo-model"
EOS = 1
OUT = 32
BF16_SLACK = 0.25  # logits: what bf16 arithmetic moves them by, at this depth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def prompts() -> list[tuple[int, ...]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    texts = [f"What is {a} + {b}?" for a in range(3, 60, 7) for b in range(4, 50, 9)]
    texts += ["What is the capital of France?", "Count from 3 to 20.", "Tell me a story about a fox."]
    out = []
    for i, text in enumerate(texts):
        turns = [{"role": "user", "content": text}]
        if i % 5 == 0:
            turns = [*turns, {"role": "assistant", "content": "Fine. " * (i % 60)}, *turns]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        out.append(tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    return out


def ours(dtype: str, requests: list[EngineRequest], **engine: Any) -> dict[str, list[int]]:
    config = ReplicaConfig(ModelConfig(str(FOLDER), "demo", dtype=dtype), EngineConfig(**engine), device="cuda")
    rank = Rank(config)
    made = rank.make_engine()
    tokens = run_to_completion(made, requests)
    made.check_ledgers()
    rank.close()
    return tokens


def greedy(ids: list[tuple[int, ...]]) -> list[EngineRequest]:
    return [EngineRequest(str(i), p, SamplingParams(OUT, temperature=0.0, stop_ids=(EOS,))) for i, p in enumerate(ids)]


@pytest.mark.parametrize("engine", [{}, {"max_num_batched_tokens": 64, "max_num_seqs": 16}, {"step_ahead": False}])
def test_fp32_gives_the_tokens_of_transformers(engine: dict[str, Any]) -> None:
    ids = prompts()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).cuda().eval()
    got = ours("float32", greedy(ids), **engine)
    for i, prompt in enumerate(ids):
        given = torch.tensor([prompt], device="cuda")
        with torch.inference_mode():
            out = model.generate(given, max_new_tokens=OUT, do_sample=False, eos_token_id=EOS, pad_token_id=5)
        assert got[str(i)] == out[0, len(prompt) :].tolist(), f"prompt {i}"


def test_bf16_draws_what_transformers_finds_likeliest_up_to_rounding() -> None:
    ids = prompts()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).cuda().eval()
    got = ours("bfloat16", greedy(ids))
    for i, prompt in enumerate(ids):
        tokens = got[str(i)]
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]], device="cuda")).logits[0, len(prompt) - 1 :].float()
        short = logits.max(dim=-1).values - logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert short.max().item() <= BF16_SLACK, f"prompt {i}"


def test_seeded_sampling_does_not_depend_on_the_batch() -> None:
    ids = prompts()
    requests = [
        EngineRequest(str(i), p, SamplingParams(OUT, temperature=0.8, top_p=0.95, seed=i)) for i, p in enumerate(ids)
    ]
    together = ours("float32", requests)
    few = ours("float32", requests[:7], max_num_seqs=2)
    assert {k: together[k] for k in few} == few
