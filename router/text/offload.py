"""Work on text beside the event loop.

The tokenizers library releases the GIL, so a thread really runs beside the loop; a hop costs about 60 us, what encoding
2 kB does, so that short texts are done at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

INLINE_CHARACTERS = 2048
T = TypeVar("T")


class TextPool:
    """A few threads for templates, tokenizing and large bodies."""

    def __init__(self, threads: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="echelon-text")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, done here when `size` (characters or bytes) is small, else in a thread."""
        if size < INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Stop the threads; work in progress ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
