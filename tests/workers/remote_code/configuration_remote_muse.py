"""The config of a checkpoint that brings its own code, as such files look."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RemoteMuseConfig(PretrainedConfig):
    model_type = "remote_muse"

    def __init__(
        self,
        vocab_size: int = 96,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 128,
        **more: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**more)
