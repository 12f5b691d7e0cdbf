"""Text to ids without holding up other threads, and within a limit."""

from __future__ import annotations

import tokenizers

from router.text.bounds import LONG_RUN, MOST_IN_LONG_RUNS, TokenBound
from workers.api.errors import ContextLengthExceeded, InvalidRequest


def ids_of(
    backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool, limit: int | None, noun: str
) -> list[int]:
    """The ids of `text`. Raises ContextLengthExceeded (for `noun`) when they are more than `limit`.

    The library's `encode` holds the interpreter all the while (seconds for a megabyte, measured on 0.23); its batches
    do not, and without offsets they take half the time.
    """
    encoding = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
    if limit is not None and len(encoding) > limit:  # before a list of them is made
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, your {noun} resulted in "
            f"{len(encoding)} tokens. Please reduce the length of the {noun}.",
            param=noun,
        )
    ids: list[int] = encoding.ids
    return ids


def check_bound(bound: TokenBound, text: str, *, limit: int | None, noun: str) -> None:
    """Raises ContextLengthExceeded for a text that has more than `limit` tokens for certain, without tokenizing it.

    Raises InvalidRequest for one that it would take too long to tokenize.
    """
    if limit is not None and bound.exceeds(text, limit):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, your {noun} resulted in more than that, "
            f"with {len(text)} characters. Please reduce the length of the {noun}.",
            param=noun,
        )
    if bound.too_slow(text):
        raise InvalidRequest(
            f"Invalid '{noun}': more than {MOST_IN_LONG_RUNS} characters stand in runs of more than {LONG_RUN} without "
            "a space or a change between letters and punctuation. Break them up.",
            param=noun,
            code="invalid_value",
        )
