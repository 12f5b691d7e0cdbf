"""The model of a checkpoint that brings its own code: its attention is its own, and knows no attention functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_remote_muse import RemoteMuseConfig


class RemoteMuseAttention(nn.Module):
    def __init__(self, config: RemoteMuseConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(above, -torch.inf).softmax(-1) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = (
            p(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(*split).transpose(1, 2).reshape(batch, tokens, width))


class RemoteMuseLayer(nn.Module):
    def __init__(self, config: RemoteMuseConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = RemoteMuseAttention(config, layer_idx)
        self.wide = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.narrow = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.narrow(torch.tanh(self.wide(self.norm_2(x))))


class RemoteMusePreTrainedModel(PreTrainedModel):
    config_class = RemoteMuseConfig
    base_model_prefix = "model"


class RemoteMuseModel(RemoteMusePreTrainedModel):
    def __init__(self, config: RemoteMuseConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(RemoteMuseLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any) -> Any:
        places = (
            torch.arange(input_ids.shape[1], device=input_ids.device)[None] if position_ids is None else position_ids
        )
        x = self.tokens(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class RemoteMuseForCausalLM(RemoteMusePreTrainedModel):
    def __init__(self, config: RemoteMuseConfig) -> None:
        super().__init__(config)
        self.model = RemoteMuseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **given)[0]))
