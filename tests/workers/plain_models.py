"""Plain references for families whose modelling code lives in the checkpoint.

Written from the papers and from the names and shapes of the published tensors, one prompt at a time, without a cache
and without anything of ours. A reference takes the config.json, the tensors by name and the token ids, and returns
logits.

Shapes: T tokens, C channels, H heads, K KV heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn_halves(x: torch.Tensor, base: float) -> torch.Tensor:
    """x [T, H, R]: channel i and channel i + R / 2 are a point that is turned by position * base^(-2 i / R)."""
    tokens, _, size = x.shape
    angle = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, size, 2) / size)
    point = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([point.real, point.imag], dim=-1)


def turn_neighbours(x: torch.Tensor, base: float) -> torch.Tensor:
    """The same with channels 2 i and 2 i + 1."""
    tokens, _, size = x.shape
    angle = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, size, 2) / size)
    point = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(point * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """q [T, H, D], k and v [T, K, D], bias [H, T, T] -> [T, H * D]; KV head i belongs to H / K query heads in turn."""
    tokens, heads, size = q.shape
    out = torch.empty_like(q)
    for head in range(heads):
        kv = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, kv].T / math.sqrt(size)
        if bias is not None:
            scores = scores + bias[head]
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        out[:, head] = scores.softmax(-1) @ v[:, kv]
    return out.flatten(1)


def press_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi as the paper's code gives them."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start ** (i + 1) for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return press_slopes(closest) + press_slopes(2 * closest)[0::2][: heads - closest]


def internlm(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, size = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]
    x = t["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"

        def project(y: torch.Tensor, name: str, at: str = at) -> torch.Tensor:
            return y @ t[f"{at}.{name}.weight"].T + t.get(f"{at}.{name}.bias", torch.zeros(()))

        y = rms(x, t[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (project(y, f"self_attn.{n}_proj").view(-1, heads, size) for n in "qkv")
        x = x + project(attend(turn_halves(q, 1e4), turn_halves(k, 1e4), v), "self_attn.o_proj")
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        x = x + project(F.silu(project(y, "mlp.gate_proj")) * project(y, "mlp.up_proj"), "mlp.down_proj")
    return rms(x, t["model.norm.weight"], c["rms_norm_eps"]) @ t["lm_head.weight"].T


def internlm2(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    group, size = heads // kv_heads, c["hidden_size"] // heads
    x = t["model.tok_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = rms(x, t[f"{at}.attention_norm.weight"], c["rms_norm_eps"])
        # For each KV head: its query heads, its key, its value.
        packed = (y @ t[f"{at}.attention.wqkv.weight"].T).view(len(ids), kv_heads, group + 2, size)
        q, k, v = packed[:, :, :group].flatten(1, 2), packed[:, :, group], packed[:, :, group + 1]
        turned = attend(turn_halves(q, c["rope_theta"]), turn_halves(k, c["rope_theta"]), v)
        x = x + turned @ t[f"{at}.attention.wo.weight"].T
        y = rms(x, t[f"{at}.ffn_norm.weight"], c["rms_norm_eps"])
        w1, w2, w3 = (t[f"{at}.feed_forward.w{n}.weight"].T for n in (1, 2, 3))
        x = x + (F.silu(y @ w1) * (y @ w3)) @ w2
    return rms(x, t["model.norm.weight"], c["rms_norm_eps"]) @ t["output.weight"].T


def baichuan(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, hidden = c["num_attention_heads"], c["hidden_size"]
    size, alibi = hidden // heads, "max_position_embeddings" not in c
    distance = torch.arange(len(ids))[None, :] - torch.arange(len(ids))[:, None]
    bias = torch.tensor(press_slopes(heads))[:, None, None] * distance if alibi else None
    x = t["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = rms(x, t[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        packed = (y @ t[f"{at}.self_attn.W_pack.weight"].T).view(len(ids), 3, heads, size)
        q, k, v = packed.unbind(1)
        if not alibi:
            q, k = turn_halves(q, 1e4), turn_halves(k, 1e4)
        x = x + attend(q, k, v, bias) @ t[f"{at}.self_attn.o_proj.weight"].T
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        gate, up, down = (t[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate) * (y @ up)) @ down
    head = t["lm_head.weight"]
    if "z_loss_weight" in c:
        head = head / head.norm(dim=1, keepdim=True)
    return rms(x, t["model.norm.weight"], c["rms_norm_eps"]) @ head.T


def chatglm(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, groups, size = c["num_attention_heads"], c["multi_query_group_num"], c["kv_channels"]
    eps, base = c["layernorm_epsilon"], 10000.0 * c["rope_ratio"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([turn_neighbours(x[..., : size // 2], base), x[..., size // 2 :]], dim=-1)

    x = t["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{i}"
        y = rms(x, t[f"{at}.input_layernorm.weight"], eps)
        packed = y @ t[f"{at}.self_attention.query_key_value.weight"].T
        packed = packed + t[f"{at}.self_attention.query_key_value.bias"]
        q, k, v = packed.split([heads * size, groups * size, groups * size], dim=-1)
        q, k, v = q.view(-1, heads, size), k.view(-1, groups, size), v.view(-1, groups, size)
        x = x + attend(turn(q), turn(k), v) @ t[f"{at}.self_attention.dense.weight"].T
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = (y @ t[f"{at}.mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ t[f"{at}.mlp.dense_4h_to_h.weight"].T
    return rms(x, t["transformer.encoder.final_layernorm.weight"], eps) @ t["transformer.output_layer.weight"].T


def qwen(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, trained, eps = c["num_attention_heads"], c["seq_length"], c["layer_norm_epsilon"]
    size, length = c["kv_channels"], len(ids)
    base = c["rotary_emb_base"]
    if c["use_dynamic_ntk"] and length > trained:
        alpha = 2 ** math.ceil(math.log(length / trained, 2) + 1) - 1
        base = base * alpha ** (size / (size - 2))
    grow = torch.tensor([max(1.0, math.log(i + 1) / math.log(trained)) for i in range(length)])
    x = t["transformer.wte.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"transformer.h.{i}"
        y = rms(x, t[f"{at}.ln_1.weight"], eps)
        packed = y @ t[f"{at}.attn.c_attn.weight"].T + t[f"{at}.attn.c_attn.bias"]
        q, k, v = (part.view(-1, heads, size) for part in packed.chunk(3, dim=-1))
        q, k = turn_halves(q, base), turn_halves(k, base)
        if c["use_logn_attn"]:
            q = q * grow[:, None, None]
        x = x + attend(q, k, v) @ t[f"{at}.attn.c_proj.weight"].T
        y = rms(x, t[f"{at}.ln_2.weight"], eps)
        inner = (y @ t[f"{at}.mlp.w1.weight"].T) * F.silu(y @ t[f"{at}.mlp.w2.weight"].T)
        x = x + inner @ t[f"{at}.mlp.c_proj.weight"].T
    return rms(x, t["transformer.ln_f.weight"], eps) @ t["lm_head.weight"].T


def deepseek_moe(c: Config, t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    heads, size = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"]

    def feed(y: torch.Tensor, at: str) -> torch.Tensor:
        gate, up, down = (t[f"{at}.{n}_proj.weight"].T for n in ("gate", "up", "down"))
        return (F.silu(y @ gate) * (y @ up)) @ down

    def mix(y: torch.Tensor, at: str) -> torch.Tensor:
        out = feed(y, f"{at}.shared_experts")
        shares = (y @ t[f"{at}.gate.weight"].T).softmax(-1)
        for token in range(len(y)):
            best = sorted(range(c["n_routed_experts"]), key=lambda e: -float(shares[token, e]))
            chosen = best[: c["num_experts_per_tok"]]
            whole = shares[token, chosen].sum() if c["norm_topk_prob"] else 1.0
            for expert in chosen:
                out[token] += shares[token, expert] / whole * feed(y[token], f"{at}.experts.{expert}")
        return out

    x = t["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = rms(x, t[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = ((y @ t[f"{at}.self_attn.{n}_proj.weight"].T).view(-1, heads, size) for n in "qkv")
        x = x + attend(turn_halves(q, 1e4), turn_halves(k, 1e4), v) @ t[f"{at}.self_attn.o_proj.weight"].T
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        x = x + (feed(y, f"{at}.mlp") if i < c["first_k_dense_replace"] else mix(y, f"{at}.mlp"))
    return rms(x, t["model.norm.weight"], c["rms_norm_eps"]) @ t["lm_head.weight"].T


Reference = Callable[[Config, Tensors, torch.Tensor], torch.Tensor]
