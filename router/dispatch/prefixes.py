"""Which prompts a replica's prefix cache would hit, from the hashes of the blocks that it tells of.

A block's hash covers all before it and its owner's salt (`workers.api.hashing`): who holds a block has held the whole
prefix, and the engine gives up tails first.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from router.slices import at_once, in_slices
from workers.api.hashing import SHORT_BYTES, chained_hashes
from workers.api.replica import CacheNews

MOST_HASHES = 256  # of one prompt that travel: 2 KiB
_BLOCKS_AT_ONCE = 128  # hashed before others get their turn: about 0.3 ms


@dataclass(frozen=True, slots=True)
class PromptHashes:
    """The hashes, SHORT_BYTES each, of every `stride`-th block of `block_size` tokens of a prompt, first to last."""

    block_size: int
    stride: int
    digests: bytes


async def prompt_hashes(
    token_ids: Sequence[int], block_size: int, *, salt: bytes = b"", adapter: str | None = None
) -> PromptHashes:
    """At most MOST_HASHES of the blocks that a prefix cache could hit. A long prompt gives way to others now and then.

    In slices, not in a thread: hashing small blocks holds the interpreter's lock, and a thread gives it up less often.
    """
    return await in_slices(_hashing(token_ids, block_size, salt, adapter))


def prompt_hashes_now(token_ids: Sequence[int], block_size: int) -> PromptHashes:
    """The same at once, for an owner without a salt."""
    return at_once(_hashing(token_ids, block_size, b"", None))


def _hashing(
    token_ids: Sequence[int], block_size: int, salt: bytes, adapter: str | None
) -> Generator[None, None, PromptHashes]:
    blocks = (len(token_ids) - 1) // block_size  # of a prompt that is known whole, one token is left to run
    stride = max(-(-blocks // MOST_HASHES), 1)
    digests = bytearray()
    hashes = chained_hashes(token_ids, block_size, salt=salt, adapter=adapter)
    for number in range(1, blocks // stride * stride + 1):
        digest = next(hashes)
        if number % stride == 0:
            digests += digest[:SHORT_BYTES]
        if number % _BLOCKS_AT_ONCE == 0:
            yield
    return PromptHashes(block_size, stride, bytes(digests))


class PrefixIndex:
    """The blocks that one replica's prefix cache holds, as far as it has told: at most `most`, the rest is not kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._held)

    def take(self, news: CacheNews) -> None:
        """Blocks came and went."""
        held = self._held
        if news.anew:
            held.clear()
        held.difference_update(_cut(news.lost))
        gained = _cut(news.gained)
        held.update(gained[: max(self._most - len(held), 0)])

    def cached(self, prompt: PromptHashes) -> int:
        """Tokens of `prompt` that would be hit, rounded down to the hashes that it brings."""
        held, digests = self._held, prompt.digests
        if digests[:SHORT_BYTES] not in held:
            return 0
        low, high = 1, len(digests) // SHORT_BYTES  # the first `low` are held
        while low < high:
            middle = (low + high + 1) // 2
            if digests[(middle - 1) * SHORT_BYTES : middle * SHORT_BYTES] in held:
                low = middle
            else:
                high = middle - 1
        return low * prompt.stride * prompt.block_size


def _cut(digests: bytes) -> list[bytes]:
    return [digests[at : at + SHORT_BYTES] for at in range(0, len(digests), SHORT_BYTES)]
