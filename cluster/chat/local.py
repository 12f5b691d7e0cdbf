"""Answers of a model in this process: one rank and its engine, no Ray and no HTTP."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from cluster.chat.terminal import Message
from cluster.pipeline.generation_config import GenerationConfig
from cluster.pipeline.pipeline import pipeline
from workers.api.errors import ConfigError, ContextLengthExceeded


class LocalAnswers:
    """Of the checkpoint `model` (as `echelon serve` takes it), drawn as a server would without further words.

    `options` are those of `echelon.pipeline`. Raises ConfigError, WeightError or OutOfMemory.
    """

    def __init__(self, model: str, temperature: float | None, **options: Any) -> None:
        self._pipeline = pipeline(model, **options)
        if self._pipeline.tokenizer.chat is None:
            raise ConfigError(f"{model} is not a chat model: say a template (--chat-template) or --cap completion")
        self._config = GenerationConfig(
            max_new_tokens=self._pipeline.session_len, top_k=0, temperature=1.0 if temperature is None else temperature
        )
        self.name = self._pipeline.name

    def stream(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        """See `cluster.chat.terminal.Answers`. Ctrl-C ends it after the step under way."""
        with closing(self._pipeline.stream_infer([dict(m) for m in messages], self._config)) as pieces:
            for piece in pieces:
                if piece.finish_reason == "length" and not piece.generate_token_len:
                    raise ContextLengthExceeded("The conversation is longer than the model's context: /reset it.")
                yield piece.text
