"""The byte-level BPE tokenizer of the demo model and its chat template, written as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from corpus import ASSISTANT, BEGIN, END, PAD, SPECIAL, SYSTEM, USER
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# `content` may be a string or a list of OpenAI-style parts, of which the text ones are read.
CHAT_TEMPLATE = (
    "{{- '" + BEGIN + "' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '" + SYSTEM + "' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '" + USER + "' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '" + ASSISTANT + "' -}}"
    "{%- else -%}{{- raise_exception('the demo model knows the roles system, user and assistant') -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '" + END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Train a BPE over `texts` with every byte in its alphabet, so that any UTF-8 text comes back exactly.

    Digits are tokens of their own and never merge. The special tokens get the ids 0..5.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"wanted {vocab_size} tokens, got {tokenizer.get_vocab_size()}: give it more text")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; `max_length` is in tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
