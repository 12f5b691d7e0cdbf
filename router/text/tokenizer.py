"""A checkpoint's tokenizer, from its folder, by the tokenizers library alone (transformers would import torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from router.text.bounds import TokenBound
from router.text.chat import ChatEncoder
from router.text.checkpoint import read_backend, read_facts
from router.text.detokenizer import ByteDetokenizer, ContextDetokenizer, Detokenizer, TokenTexts
from router.text.encoding import check_bound, ids_of
from router.text.infilling import find_infilling
from router.text.literal import LiteralSpecials
from router.text.rendering import DirectRenderer, Renderer
from router.text.template_choice import Template, renderer_of
from router.text.template_pool import TemplatePool
from router.text.templates import ChatTemplate, check_template, names_read
from router.text.token_bytes import TokenBytes
from workers.api.errors import InvalidRequest


class Tokenizer:
    """Text to ids and back, for one checkpoint. Thread-safe: caches are written once.

    `vocab_size` counts ids (config.json's where it says one), `context_length` is in tokens (None = not said),
    `eos_ids` end an answer, and so do `stop_words`, words of a chat template that are no tokens; `special_ids` are not
    shown, `chat` encodes conversations (None = not a chat model), `template` is its chat template where that is jinja,
    `named_tokens` are the special tokens that templates may name,
    `infilling` is the form of prompts with a suffix (None = the model knows none), and `token_bytes` gives what one
    token stands for by itself (for logprobs).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        stop_words: Sequence[str] = (),
        renderer: Renderer | None = None,
        context_length: int | None = None,
        vocab_size: int | None = None,
        template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        ends = {word: backend.token_to_id(word) for word in stop_words}
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *(i for i in ends.values() if i is not None)]))
        self.stop_words = tuple(word for word, i in ends.items() if i is None)
        self.context_length = context_length
        self.template, self.named_tokens = template or "", dict(named_tokens or {})
        self.vocab_size = vocab_size or backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.token_bytes = TokenBytes(backend)
        self._texts = TokenTexts(self.token_bytes, self.special_ids)
        self._texts_with_specials = TokenTexts(self.token_bytes, ())
        self._texts_with_some: dict[frozenset[int | None], TokenTexts] = {}  # by the special tokens that are shown
        self._bound = TokenBound(backend, self.token_bytes)
        self.infilling = find_infilling(backend.token_to_id)
        self._literal: LiteralSpecials | None = None
        self.chat = self.chat_by(renderer, template) if renderer else None

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, trust_template: bool = False, template: Template | None = None
    ) -> Tokenizer:
        """The tokenizer of a checkpoint in the Hugging Face layout, with `template` for its chat template, if given.

        A template in jinja runs in a process with limits, or, with `trust_template`, in this one. Raises ConfigError
        when a file is missing or broken.
        """
        root = Path(folder)
        backend = read_backend(root)
        facts = read_facts(root, backend)
        source = facts.chat_template if template is None else template
        renderer: Renderer | None = None
        stop_words: tuple[str, ...] = ()
        if source is not None and not isinstance(source, str):
            renderer, form = renderer_of(source, backend)
            stop_words = form.stop_words
        elif source is not None:
            check_template(source)
            if trust_template:
                renderer = DirectRenderer(ChatTemplate(source, facts.named_tokens))
            else:
                renderer = TemplatePool(source, facts.named_tokens, name=root.name)
        return cls(
            backend,
            eos_ids=facts.eos_ids,
            stop_words=stop_words,
            renderer=renderer,
            context_length=facts.context_length,
            vocab_size=facts.vocab_size,
            template=source if isinstance(source, str) else "",
            named_tokens=facts.named_tokens,
        )

    def chat_by(self, renderer: Renderer, template: str | None) -> ChatEncoder:
        """What encodes conversations by `renderer`, whose template that is."""
        self._literal = self._literal or LiteralSpecials(self._backend)
        return ChatEncoder(self._backend, renderer, self._bound, self._literal, template)

    def encode(self, text: str, *, limit: int | None = None, add_special_tokens: bool = True) -> list[int]:
        """Ids of a plain prompt: begin-of-sequence as the tokenizer adds it, special strings recognised.

        Raises ContextLengthExceeded when they are more than `limit`, if possible before tokenizing.
        """
        check_bound(self._bound, text, limit=limit, noun="prompt")
        return ids_of(self._backend, text, add_special_tokens=add_special_tokens, limit=limit, noun="prompt")

    def encode_infilling(self, prefix: str, suffix: str, *, limit: int | None = None) -> tuple[int, ...]:
        """Ids of a prompt for what stands between the two; special strings in them are recognised, as in `encode`.

        Raises InvalidRequest where the model knows no such prompts, ContextLengthExceeded as `encode`.
        """
        if self.infilling is None:
            raise InvalidRequest(
                "Invalid 'suffix': this model has no tokens for filling in, so that it would not see the suffix.",
                param="suffix",
                code="invalid_value",
            )
        for text in (prefix, suffix):
            check_bound(self._bound, text, limit=limit, noun="prompt")
        parts = [
            ids_of(self._backend, text, add_special_tokens=False, limit=limit, noun="prompt")
            for text in (prefix, suffix)
        ]
        lead = ids_of(self._backend, "", add_special_tokens=True, limit=None, noun="prompt")
        return self.infilling.prompt(lead, *parts)

    @cached_property
    def template_reads(self) -> frozenset[str]:
        """Names of variables that the chat template looks at; none are known of one that is no jinja."""
        return names_read(self.template)

    @property
    def eos_token(self) -> str | None:
        """What the first of `eos_ids` is called; None: there is none."""
        return self._backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    @property
    def bos_token(self) -> str | None:
        """What the tokenizer puts before any text; None: nothing."""
        leading = ids_of(self._backend, "", add_special_tokens=True, limit=None, noun="prompt")
        return self._backend.id_to_token(leading[0]) if leading else None

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The ways in which `word` is tokenized: at a text's beginning, after a space, and after a line's end."""
        found: dict[tuple[int, ...], None] = {}
        for before in ("", " ", "\n"):
            both = self._plain_ids(before + word)
            first = self._plain_ids(before)
            if both[: len(first)] == first:
                found[both[len(first) :]] = None
            elif before == " ":  # the space is a part of the word's first token
                found[both] = None
        return tuple(ids for ids in found if ids)

    def _plain_ids(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        return tuple(ids_of(self._backend, text, add_special_tokens=False, limit=None, noun="bad_words"))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids outside the vocabulary give none."""
        # As with `ids_of`: a batch does not hold the interpreter.
        return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def detokenizer(self, *, skip_special_tokens: bool = True, shown: Sequence[str] = ()) -> Detokenizer:
        """A fresh incremental decoder for one answer; of special tokens it shows those that `shown` names."""
        kept = frozenset(i for i in map(self._backend.token_to_id, shown) if i in self.special_ids)
        skipped = self.special_ids - kept if skip_special_tokens else frozenset[int]()
        if self.token_bytes.is_byte_level:
            if not kept or not skip_special_tokens:
                return ByteDetokenizer(self._texts if skip_special_tokens else self._texts_with_specials)
            if kept not in self._texts_with_some:
                self._texts_with_some[kept] = TokenTexts(self.token_bytes, skipped)
            return ByteDetokenizer(self._texts_with_some[kept])
        return ContextDetokenizer(
            lambda ids: self._backend.decode(ids, skip_special_tokens=False), self.token_bytes.is_byte, skipped
        )
