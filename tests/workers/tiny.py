"""Tiny random checkpoints made by transformers, ranks over them, and logits of a plan's every token."""

from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import transformers

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.context import ForwardContext, forward_context
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.parallel.group import Groups
from workers.rank import Rank

VOCAB = 301  # not a multiple of anything, so that the padding of the vocabulary matters
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # small weights would make every distribution flat and every bug invisible
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-rope-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@functools.cache
def reference(name: str) -> transformers.PreTrainedModel:
    """transformers' model `name` of FAMILY with seeded weights, biases and norms that are not their defaults."""
    prefix, changes = FAMILY[name]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **changes})
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="echelon-tiny-")


def checkpoint(name: str) -> Path:
    """The folder of `reference(name)`, made once a test run, whichever rank's thread asks first."""
    with _MAKING:
        return _made(name)


_MAKING = threading.Lock()


@functools.cache
def _made(name: str) -> Path:
    folder = Path(_root().name) / name
    reference(name).save_pretrained(folder)
    return folder


def replica(
    path: Path | str, *, tensor_parallel: int = 1, load_format: str = "safetensors", **engine: Any
) -> ReplicaConfig:
    """A config for the CPU in fp32 with a small cache."""
    limits = {"cache_bytes_cpu": 8 << 20, "max_num_batched_tokens": 512, "max_num_seqs": 32, **engine}
    return ReplicaConfig(
        ModelConfig(str(path), "tiny", dtype="float32", load_format=load_format),
        EngineConfig(**limits),
        tensor_parallel=tensor_parallel,
        device="cpu",
    )


def rank_of(name: str, *, rank: int = 0, groups: Groups | None = None, threaded: bool = False, **engine: Any) -> Rank:
    """A rank over `checkpoint(name)`."""
    size = 1 if groups is None else groups.tp.size
    config = replica(checkpoint(name), tensor_parallel=size, **engine)
    return Rank(config, rank=rank, groups=groups, threaded=threaded)


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> tuple[int, ...]:
    """Seeded random token ids."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


def request(name: str, ids: tuple[int, ...], **sampling: Any) -> EngineRequest:
    """A greedy request for 8 tokens, unless said otherwise."""
    return EngineRequest(name, ids, SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling}))


def generate(model: Any, ids: tuple[int, ...], count: int) -> list[int]:
    """transformers' greedy continuation of `count` tokens, without an end of sequence."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def added(slot: int, ids: tuple[int, ...], blocks: tuple[int, ...] = (), **sampling: Any) -> NewSequence:
    """A new sequence, all of it prompt."""
    return NewSequence(slot, ids, len(ids), SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **sampling}), blocks)


def run(slot: int, start: int, count: int, *, emit: int = 1, blocks: tuple[int, ...] = ()) -> ScheduledSequence:
    """Shorter than the constructor."""
    return ScheduledSequence(slot, start, count, emit, blocks)


@torch.inference_mode()
def plan_logits(rank: Rank, plan: StepPlan) -> torch.Tensor:
    """Logits [T, V] of every token of the plan; nothing is drawn."""
    runner = rank.runner
    inputs = runner.state.prepare(plan)
    with forward_context(ForwardContext((inputs.attention,) * len(runner.caches), runner.caches)):
        return rank.model.compute_logits(rank.model(inputs.input_ids, inputs.positions)).clone()
