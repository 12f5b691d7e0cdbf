"""Tiny checkpoints of architectures that are run through transformers' own modules, and ranks over them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import _root, plan_logits, replica

from workers.api.request import SamplingParams
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.parallel.group import Groups
from workers.parallel.local import run_ranks
from workers.rank import Rank

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}

FOREIGN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, "attention_bias": True}),
    "llama-one-kv": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, "num_key_value_heads": 1}),
    "qwen3-tied": ("Qwen3Config", "Qwen3ForCausalLM", {**_SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_GPT, "rotary_dim": 4, "n_ctx": 128}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, "init_std": 0.2, "word_embed_proj_dim": 32,
        },
    ),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_SIZES, "head_dim": 8, "sliding_window": 12}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_SIZES, "num_local_experts": 4}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_SIZES, "head_dim": 8, "sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": _YARN, "eos_token_id": 0, "pad_token_id": 0,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_SIZES, "pad_token_id": 0}),
    "deepseek-v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_SIZES, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 16, "kv_lora_rank": 16,
            "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        },
    ),
}  # fmt: skip


@functools.cache
def reference(name: str) -> Any:
    """transformers' model `name` of FOREIGN with seeded weights, biases and norms that are not their defaults."""
    config, model, settings = FOREIGN[name]
    torch.manual_seed(sum(name.encode()))
    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 0.3)
            elif "norm" in key or "ln_" in key:
                parameter.uniform_(0.5, 1.5)
    made.generation_config.eos_token_id = None
    return made


@functools.cache
def checkpoint(name: str) -> Path:
    """The folder of `reference(name)`, made once a test run."""
    folder = Path(_root().name) / f"foreign-{name}"
    reference(name).save_pretrained(folder)
    return folder


def rank_over(
    folder: Path, *, rank: int = 0, groups: Groups | None = None, implementation: str = "transformers", **model: Any
) -> Rank:
    """A rank over a checkpoint, through transformers' modules unless said otherwise."""
    groups = groups or Groups()
    config = replica(folder, tensor_parallel=groups.tp.size, num_blocks=32, max_num_seqs=4)
    config = replace(config, model=replace(config.model, implementation=implementation, **model))
    return Rank(config, rank=rank, groups=groups)


def sequence(slot: int, ids: tuple[int, ...], blocks: tuple[int, ...]) -> NewSequence:
    """A new sequence that is all prompt."""
    return NewSequence(slot, ids, len(ids), SamplingParams(max_tokens=1, temperature=0.0), blocks)


def steps_of(long: tuple[int, ...], short: tuple[int, ...]) -> list[StepPlan]:
    """A chunk; the next beside another prompt; two decodes. `long` has 24 tokens, `short` 6, blocks in no order."""

    def run(slot: int, start: int, count: int) -> ScheduledSequence:
        return ScheduledSequence(slot, start, count, 0)

    return [
        StepPlan(1, (), (sequence(2, long, (9, 4)),), (run(2, 0, 14),)),
        StepPlan(2, (), (sequence(0, short, (7,)),), (run(2, 14, 9), run(0, 0, 5))),
        StepPlan(3, (), (), (run(0, 5, 1), run(2, 23, 1))),
    ]


def step_logits(folder: Path, plans: list[StepPlan], *, size: int = 1, **model: Any) -> list[torch.Tensor]:
    """Logits of every token of the plans, after one another; those of rank 0, to which all others are equal."""

    def work(rank: int, groups: Groups) -> list[torch.Tensor]:
        one = rank_over(folder, rank=rank, groups=groups, **model)
        for cache in one.runner.caches:  # what is not written must not matter
            cache.key.fill_(torch.nan)
            cache.value.fill_(torch.nan)
        return [plan_logits(one, plan) for plan in plans]

    ranks = run_ranks(size, work)
    for other in ranks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ranks[0], other, strict=True)), "the ranks' bits differ"
    return ranks[0]


def assert_logits(got: list[torch.Tensor], name: str, long: tuple[int, ...], short: tuple[int, ...]) -> None:
    """`step_logits` of the steps of `steps_of` are transformers'."""
    for one, want in zip(got, wanted_logits(name, long, short), strict=True):
        torch.testing.assert_close(one, want, atol=1e-4, rtol=1e-4)


def wanted_logits(name: str, long: tuple[int, ...], short: tuple[int, ...]) -> list[torch.Tensor]:
    """transformers' logits for the steps of `steps_of`."""
    with torch.inference_mode():
        a, b = (reference(name)(torch.tensor([ids])).logits[0] for ids in (long, short))
    return [a[:14], torch.cat([a[14:23], b[:5]]), torch.stack([b[5], a[23]])]
