"""A checkpoint's tokenizer, from its folder, by the tokenizers library alone (transformers would import torch).

Reads tokenizer.json, tokenizer_config.json, generation_config.json, config.json and chat_template.jinja. All methods
are thread-safe: the library releases the GIL, and what is cached is written once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from router.text.detokenizer import ByteDetokenizer, ContextDetokenizer, Detokenizer
from router.text.literal import LiteralSpecials
from router.text.templates import ChatTemplate, Message, Renderer
from workers.api.errors import ConfigError, InvalidRequest

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back, for one checkpoint.

    `vocab_size` counts ids (config.json's where it says one), `context_length` is in tokens (None = not said),
    `eos_ids` end an answer, `special_ids` are not shown, `chat` renders messages (None = not a chat model).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        chat: Renderer | None = None,
        context_length: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat = chat
        self.eos_ids = tuple(eos_ids)
        self.context_length = context_length
        self.vocab_size = vocab_size or backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._literal = LiteralSpecials(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: str | Path, *, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint in the Hugging Face layout; `chat_template` (source) replaces its own.

        Raises ConfigError when a file is missing or broken.
        """
        root = Path(folder)
        if not (root / "tokenizer.json").is_file():
            raise ConfigError(
                f"{root} has no tokenizer.json. Save one there with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
        except Exception as e:  # the library raises bare Exception
            raise ConfigError(f"{root / 'tokenizer.json'} cannot be read: {e}") from e
        settings = _read_json(root / "tokenizer_config.json")
        generation = _read_json(root / "generation_config.json")
        model = _read_json(root / "config.json")
        text_model = model.get("text_config", model)
        source = chat_template or _template_source(root, settings)
        return cls(
            backend,
            eos_ids=_eos_ids(backend, generation, model, settings),
            chat=ChatTemplate(source, _named_tokens(settings)) if source else None,
            context_length=_context_length(text_model),
            vocab_size=text_model.get("vocab_size"),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt: begin-of-sequence as the tokenizer adds it, special strings recognised."""
        return self._backend.encode(text).ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Ids of a chat: the template's special strings are special, those in contents are text.

        `content` is a string. Raises InvalidRequest when there is no template or it refuses the messages.
        """
        if self.chat is None:
            raise InvalidRequest("This model has no chat template.", param="messages")
        contents = [m["content"] for m in messages if m.get("content")]
        hidden = self._literal.needed(contents)
        if hidden:
            messages = [{**m, "content": self._literal.hide(m["content"])} if m.get("content") else m for m in messages]
        text = self.chat.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
        if hidden:
            return self._literal.encode(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids outside the vocabulary give none."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder for one answer."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        if self.is_byte_level:
            return ByteDetokenizer(self.token_bytes, skipped)
        return ContextDetokenizer(
            lambda ids: self._backend.decode(ids, skip_special_tokens=False), self._is_byte_token, skipped
        )

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for its bytes, whatever its neighbours."""
        decoder = json.loads(self._backend.to_str())["decoder"] if self._backend.decoder else None
        return decoder is not None and decoder["type"] == "ByteLevel"

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: a prompt of n tokens has at most n times as many, normalization aside."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for by itself (for logprobs); empty for ids outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD for what is not UTF-8."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes([_BYTE_OF[c] for c in token])
            except KeyError:  # an added token in plain characters
                return token.encode()
        if self._is_byte_token(token_id):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def _is_byte_token(self, token_id: int) -> bool:
        token = self._backend.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet (GPT-2): printable Latin-1 is itself, the other bytes follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


_BYTE_OF = _byte_alphabet()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold an object")
    return value


def _template_source(root: Path, settings: dict[str, Any]) -> str | None:
    if (root / "chat_template.jinja").is_file():
        return (root / "chat_template.jinja").read_text("utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several under names
        named = {t["name"]: t["template"] for t in source}
        source = named.get("default")
    return source


def _token_string(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {name: _token_string(settings.get(name)) for name in _NAMED}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):  # a model's own, under names that its template may use
        found |= {name: _token_string(token) for name, token in extra.items()}
    return {name: text for name, text in found.items() if text is not None}


def _eos_ids(backend: tokenizers.Tokenizer, *configs: dict[str, Any]) -> tuple[int, ...]:
    """generation_config's (or else config's) ids, then the tokenizer's own eos_token."""
    ids: list[int] = []
    for config in configs[:-1]:
        value = config.get("eos_token_id")
        if value is not None:
            ids += value if isinstance(value, list) else [value]
            break
    text = _token_string(configs[-1].get("eos_token"))
    own = backend.token_to_id(text) if text is not None else None
    if own is not None:
        ids.append(own)
    return tuple(dict.fromkeys(ids))


def _context_length(model: dict[str, Any]) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(model.get(name), int):
            return int(model[name])
    return None
