"""Work on text beside the event loop.

The tokenizers library releases the GIL, so that a thread really runs beside the loop. A hop costs about 70 us, encoding
about 0.7 us a character: a short text is done at once, a longer one must not hold up the streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

INLINE_CHARACTERS = 512
T = TypeVar("T")


class TextPool:
    """A few threads for templates, tokenizing and large bodies."""

    def __init__(self, threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="echelon-text")

    async def run(self, size: int, work: Callable[[], T], *, inline: int = INLINE_CHARACTERS) -> T:
        """The result of `work`, done here when `size` (characters or bytes) is under `inline`, else in a thread."""
        if size < inline:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Stop the threads; work in progress ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
