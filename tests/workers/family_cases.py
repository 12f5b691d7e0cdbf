"""Every family of `docs/models.md` as a tiny random checkpoint, with the logits that it must give.

The reference is transformers' own model, or for families whose code lives in the checkpoint one of `plain_models`.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plain_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from thread_ranks import on_ranks
from tiny import BASE, added, plan_logits, prompt, replica, run

from workers.api.config import ReplicaConfig
from workers.engine.plan import StepPlan
from workers.parallel.group import Groups
from workers.rank import Rank

SMALL = {**BASE, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 14,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7, **EXPERTS,
}  # fmt: skip
ROPE = {"rope_theta": 500.0}


@dataclass(frozen=True)
class Case:
    """`model`: the start of transformers' class names, or a function of `plain_models`, then with `tensors`."""

    model: str | plain_models.Reference
    config: dict[str, Any]
    tensors: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]] | None = None
    max_model_len: int | None = None


def usual(model: str, **changes: Any) -> Case:
    """A family of transformers."""
    limit = changes.pop("max_model_len", None)
    return Case(model, {**SMALL, **changes}, max_model_len=limit)


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **ROPE, **options}}


SHORT_FACTORS, LONG_FACTORS = [1.0 + i / 10 for i in range(6)], [1.5 + i for i in range(6)]
LONGROPE = _rope("longrope", short_factor=SHORT_FACTORS, long_factor=LONG_FACTORS, original_max_position_embeddings=32)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def _llama_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Llama's tensors, without those of attention and feed-forward."""
    at = {f"model.layers.{i}.{n}_layernorm.weight": (c["hidden_size"],)
          for i in range(c["num_hidden_layers"]) for n in ("input", "post_attention")}  # fmt: skip
    vocab = (c["vocab_size"], c["hidden_size"])
    return {**at, "model.embed_tokens.weight": vocab, "lm_head.weight": vocab, "model.norm.weight": (c["hidden_size"],)}


def _gated(at: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    both = {f"{at}.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
    return {**both, f"{at}.down_proj.weight": (hidden, inner)}


def _internlm(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes, hidden = _llama_shapes(c), c["hidden_size"]
    for i in range(c["num_hidden_layers"]):
        shapes |= _gated(f"model.layers.{i}.mlp", hidden, c["intermediate_size"])
        for n in "qkvo":
            shapes[f"model.layers.{i}.self_attn.{n}_proj.weight"] = (hidden, hidden)
            shapes[f"model.layers.{i}.self_attn.{n}_proj.bias"] = (hidden,)
    return shapes


def _internlm2(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], (c["vocab_size"], c["hidden_size"])
    packed = hidden + 2 * c["num_key_value_heads"] * hidden // c["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": vocab, "output.weight": vocab}
    shapes["model.norm.weight"] = (hidden,)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.attention.wqkv.weight": (packed, hidden),
            f"{at}.attention.wo.weight": (hidden, hidden),
            f"{at}.attention_norm.weight": (hidden,),
            f"{at}.ffn_norm.weight": (hidden,),
            f"{at}.feed_forward.w1.weight": (inner, hidden),
            f"{at}.feed_forward.w2.weight": (hidden, inner),
            f"{at}.feed_forward.w3.weight": (inner, hidden),
        }
    return shapes


def _baichuan(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes, hidden = _llama_shapes(c), c["hidden_size"]
    for i in range(c["num_hidden_layers"]):
        shapes |= _gated(f"model.layers.{i}.mlp", hidden, c["intermediate_size"])
        shapes[f"model.layers.{i}.self_attn.W_pack.weight"] = (3 * hidden, hidden)
        shapes[f"model.layers.{i}.self_attn.o_proj.weight"] = (hidden, hidden)
    return shapes


def _chatglm(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = c["hidden_size"], c["ffn_hidden_size"], c["kv_channels"]
    packed = (c["num_attention_heads"] + 2 * c["multi_query_group_num"]) * size
    vocab = (c["padded_vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": vocab,
        "transformer.output_layer.weight": vocab,
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.rotary_pos_emb.inv_freq": (size // 4,),
    }
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attention.query_key_value.weight": (packed, hidden),
            f"{at}.self_attention.query_key_value.bias": (packed,),
            f"{at}.self_attention.dense.weight": (hidden, c["num_attention_heads"] * size),
            f"{at}.mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{at}.mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    return shapes


def _qwen(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"] // 2, (c["vocab_size"], c["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": vocab, "lm_head.weight": vocab}
    shapes["transformer.ln_f.weight"] = (hidden,)
    for i in range(c["num_hidden_layers"]):
        at = f"transformer.h.{i}"
        shapes |= {
            f"{at}.ln_1.weight": (hidden,),
            f"{at}.ln_2.weight": (hidden,),
            f"{at}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{at}.attn.c_attn.bias": (3 * hidden,),
            f"{at}.attn.c_proj.weight": (hidden, hidden),
            f"{at}.mlp.w1.weight": (inner, hidden),
            f"{at}.mlp.w2.weight": (inner, hidden),
            f"{at}.mlp.c_proj.weight": (hidden, inner),
        }
    return shapes


def _deepseek_moe(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes, hidden, inner = _llama_shapes(c), c["hidden_size"], c["moe_intermediate_size"]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        if i < c["first_k_dense_replace"]:
            shapes |= _gated(f"{at}.mlp", hidden, c["intermediate_size"])
            continue
        shapes[f"{at}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
        shapes |= _gated(f"{at}.mlp.shared_experts", hidden, inner * c["n_shared_experts"])
        for e in range(c["n_routed_experts"]):
            shapes |= _gated(f"{at}.mlp.experts.{e}", hidden, inner)
    return shapes


BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"], "vocab_size": 301, "hidden_size": 48, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
QWEN = {
    "architectures": ["QWenLMHeadModel"], "vocab_size": 301, "hidden_size": 48, "intermediate_size": 112,
    "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 12, "layer_norm_epsilon": 1e-6, "no_bias": True,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 256, "max_position_embeddings": 256,
    "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
DEEPSEEK = {
    **BAICHUAN, "architectures": ["DeepseekForCausalLM"], "max_position_embeddings": 256, "n_routed_experts": 6,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
}  # fmt: skip

CASES: dict[str, Case] = {
    "llama": usual("Llama"),
    "llama-yarn": usual("Llama", **_rope("yarn", **YARN)),
    "llama-dynamic": usual("Llama", **_rope("dynamic", factor=2.0), max_position_embeddings=32, max_model_len=40),
    "mistral": usual("Mistral", sliding_window=12),
    "qwen2": usual("Qwen2"),
    "qwen3": usual("Qwen3", head_dim=16),
    "gemma": usual("Gemma", head_dim=16, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "gemma2": usual("Gemma2", head_dim=16, query_pre_attn_scalar=24, sliding_window=12, attn_logit_softcapping=5.0,
                    final_logit_softcapping=7.0),
    "gemma3": usual("Gemma3", head_dim=16, query_pre_attn_scalar=24, sliding_window=12,
                    layer_types=["sliding_attention", "full_attention"],
                    rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                                     "full_attention": {"rope_type": "linear", "factor": 2.0, **ROPE}}),
    "phi": usual("Phi", hidden_act="gelu_new", qk_layernorm=True, **_rope("default", partial_rotary_factor=0.5)),
    "phi3": usual("Phi3", sliding_window=12, pad_token_id=0),
    "phi3-longrope": usual("Phi3", original_max_position_embeddings=32, pad_token_id=0, max_model_len=64, **LONGROPE),
    "phi3-partial": usual("Phi3", pad_token_id=0, hidden_size=64,
                          **_rope("default", partial_rotary_factor=0.75)),
    "starcoder2": usual("Starcoder2", sliding_window=12, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "gpt-neox": usual("GPTNeoX", hidden_act="gelu", hidden_size=64, **_rope("default", partial_rotary_factor=0.25)),
    "falcon-7b": usual("Falcon", multi_query=True, parallel_attn=True),
    "falcon-40b": usual("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon2-11b": usual("Falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "falcon-rw": usual("Falcon", multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "glm": usual("Glm", head_dim=16, pad_token_id=0, eos_token_id=1, **_rope("default", partial_rotary_factor=0.5)),
    "glm4": usual("Glm4", head_dim=16, pad_token_id=0, eos_token_id=1, **_rope("default", partial_rotary_factor=0.5)),
    "olmo2": usual("Olmo2", pad_token_id=0, eos_token_id=1),
    "olmo3": usual("Olmo3", pad_token_id=0, eos_token_id=1, sliding_window=12,
                   layer_types=["sliding_attention", "full_attention"]),
    "granite": usual("Granite", embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2,
                     logits_scaling=2.0),
    "cohere": usual("Cohere", logit_scale=0.3, eos_token_id=1, tie_word_embeddings=True),
    "cohere-plus": usual("Cohere", logit_scale=0.3, eos_token_id=1, tie_word_embeddings=True, use_qk_norm=True),
    "cohere2": usual("Cohere2", logit_scale=0.3, eos_token_id=1, tie_word_embeddings=True, sliding_window=12,
                     layer_types=["sliding_attention", "full_attention"]),
    "mixtral": usual("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=12),
    "qwen2-moe": usual("Qwen2Moe", num_experts=6, shared_expert_intermediate_size=40, norm_topk_prob=False, **EXPERTS),
    "qwen2-moe-mixed": usual("Qwen2Moe", num_experts=6, shared_expert_intermediate_size=40, norm_topk_prob=True,
                             mlp_only_layers=[0], **EXPERTS),
    "qwen3-moe": usual("Qwen3Moe", num_experts=6, norm_topk_prob=True, head_dim=16, **EXPERTS),
    "deepseek-v2": usual("DeepseekV2", **LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "deepseek-v2-lite": usual("DeepseekV2", **{**LATENT, "q_lora_rank": None},
                              **_rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.9)),
    "deepseek-v3": usual("DeepseekV3", **LATENT, n_group=4, topk_group=2),
    "dbrx": Case("Dbrx", {
        "vocab_size": 301, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "initializer_range": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 500.0},
        **_rope("default"),
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    }),
    "gpt-oss": usual("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=12,
                     layer_types=["sliding_attention", "full_attention"],
                     **_rope("yarn", **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False)),
    "internlm": Case(plain_models.internlm, {
        **BAICHUAN, "architectures": ["InternLMForCausalLM"], "bias": True, "max_position_embeddings": 256,
    }, _internlm),
    "internlm2": Case(plain_models.internlm2, {
        **BAICHUAN, "architectures": ["InternLM2ForCausalLM"], "bias": False, "max_position_embeddings": 256,
        "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 500.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }, _internlm2),
    "baichuan-7b": Case(plain_models.baichuan, {**BAICHUAN, "max_position_embeddings": 256}, _baichuan),
    "baichuan-13b": Case(plain_models.baichuan, {
        **BAICHUAN, "model_max_length": 256, "hidden_size": 96, "num_attention_heads": 12,
    }, _baichuan),
    "baichuan2-7b": Case(plain_models.baichuan, {
        **BAICHUAN, "max_position_embeddings": 256, "z_loss_weight": 0,
    }, _baichuan),
    "baichuan2-13b": Case(plain_models.baichuan, {**BAICHUAN, "model_max_length": 256, "z_loss_weight": 0}, _baichuan),
    "chatglm2": Case(plain_models.chatglm, {
        "architectures": ["ChatGLMModel"], "padded_vocab_size": 301, "hidden_size": 48, "ffn_hidden_size": 56,
        "num_layers": 2, "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
        "kv_channels": 16, "layernorm_epsilon": 1e-5, "rope_ratio": 2.0, "seq_length": 256, "add_qkv_bias": True,
        "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True,
    }, _chatglm),
    "qwen": Case(plain_models.qwen, QWEN, _qwen),
    "qwen-long": Case(plain_models.qwen, {**QWEN, "seq_length": 16}, _qwen, max_model_len=40),
    "deepseek-moe": Case(plain_models.deepseek_moe, DEEPSEEK, _deepseek_moe),
    "deepseek-moe-normalized": Case(plain_models.deepseek_moe, {**DEEPSEEK, "norm_topk_prob": True}, _deepseek_moe),
}  # fmt: skip


def _seed(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Numbers that leave no part of a model without effect."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if "norm" in module or module.startswith("ln_"):
        tensor.uniform_(0.5, 1.5, generator=generator)
    else:
        tensor.normal_(0.0, 0.3 if tensor.dim() == 1 else 0.2, generator=generator)


def implementation_of(case: Case) -> str:
    """The attention of transformers to compare with: the plain one knows soft caps and sinks, but adds Falcon's ALiBi
    twice.
    """
    return "sdpa" if case.model == "Falcon" else "eager"


@functools.cache
def _transformers(name: str) -> transformers.PreTrainedModel:
    case = CASES[name]
    config = getattr(transformers, f"{case.model}{'TextConfig' if case.model == 'Gemma3' else 'Config'}")(**case.config)
    model_class = getattr(transformers, f"{case.model}ForCausalLM")
    model = model_class._from_config(config, attn_implementation=implementation_of(case)).eval()
    generator = _seed(name)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in key and "embed_scale" not in key:
                _fill(key, tensor, generator)
    return model


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="echelon-families-")


@functools.cache
def checkpoint(name: str) -> Path:
    """The folder of a case, made once a test run."""
    case, folder = CASES[name], Path(_root().name) / name
    if case.tensors is None:
        _transformers(name).save_pretrained(folder)
        return folder
    generator, tensors = _seed(name), {}
    for key, shape in case.tensors(case.config).items():
        tensors[key] = torch.empty(shape)
        _fill(key, tensors[key], generator)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    return folder


@torch.inference_mode()
def expected(name: str, ids: tuple[int, ...]) -> torch.Tensor:
    """The reference's logits [T, V] of one prompt."""
    case = CASES[name]
    if callable(case.model):
        tensors = load_file(checkpoint(name) / "model.safetensors")
        return case.model(case.config, tensors, torch.tensor(ids))
    return _transformers(name)(torch.tensor([ids])).logits[0]


WAYS = ("prefill", "chunked", "decode", "ragged")


def logits(name: str, rank: Rank, long: tuple[int, ...], short: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Logits by way: of `long` at once; in pieces; each of its last tokens alone; beside `short`, at another place."""
    poison(rank)
    n = len(long)
    first, second = n // 2, n - 3
    blocks = tuple(range(-(-n // 16)))
    found = {"prefill": plan_logits(rank, StepPlan(1, (), (added(2, long, blocks),), (run(2, 0, n, emit=0),)))}
    poison(rank)
    back = tuple(reversed(blocks))
    pieces = [
        plan_logits(rank, StepPlan(2, (2,), (added(1, long, back),), (run(1, 0, first, emit=0),))),
        plan_logits(rank, StepPlan(3, (), (), (run(1, first, second - first, emit=0),))),
    ]
    found["chunked"] = torch.cat(pieces)
    steps = [plan_logits(rank, StepPlan(4 + i, (), (), (run(1, second + i, 1),))) for i in range(3)]
    found["decode"] = torch.cat(steps)
    spare = tuple(range(len(blocks), len(blocks) + 2))
    mixed = StepPlan(9, (), (added(0, short, spare),), (run(1, n - 1, 1), run(0, 0, len(short), emit=0)))
    found["ragged"] = plan_logits(rank, mixed)
    return found


def poison(rank: Rank) -> None:
    """What is not written must not matter."""
    for cache in rank.runner.caches:
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)


def prompts(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A long one, which fills the context of the cases that have a limit, and a short one."""
    limit = CASES[name].max_model_len
    return prompt(limit or 39, seed=1), prompt(9, seed=2)


def wanted(name: str) -> dict[str, torch.Tensor]:
    """What `logits` must give."""
    long, short = prompts(name)
    whole = expected(name, long)
    # A scaling that goes by the context is that of the reference for a prompt that fills it, so the short one is not.
    other = expected(name, short) if CASES[name].max_model_len is None else None
    ragged = whole[-1:] if other is None else torch.cat([whole[-1:], other])
    return {"prefill": whole, "chunked": whole[: len(long) - 3], "decode": whole[-3:], "ragged": ragged}


def config_of(name: str, folder: Path, tensor_parallel: int) -> ReplicaConfig:
    """Ours on the CPU in fp32, over `folder`."""
    limits = {"num_blocks": 16, "max_num_seqs": 4, "max_num_batched_tokens": 128, "cuda_graphs": False}
    config = replica(folder, tensor_parallel=tensor_parallel, **limits)
    return replace(config, model=replace(config.model, max_model_len=CASES[name].max_model_len))


def got(name: str, tensor_parallel: int) -> dict[str, torch.Tensor]:
    """What the ranks give; every rank has the same bits."""
    config = config_of(name, checkpoint(name), tensor_parallel)

    def work(rank: int, groups: Groups) -> dict[str, torch.Tensor]:
        return logits(name, Rank(config, rank=rank, groups=groups), *prompts(name))

    first, *others = on_ranks(tensor_parallel, work) if tensor_parallel > 1 else [work(0, Groups())]
    for other in others:
        assert all(torch.equal(first[way], other[way]) for way in WAYS), "the ranks' bits differ"
    if CASES[name].max_model_len is not None:
        first["ragged"] = first["ragged"][:1]
    return first
