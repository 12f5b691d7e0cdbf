"""Work on text beside the event loop.

Encoding releases the interpreter (`router.text.encoding`), so that a thread really runs beside the loop. A hop costs
about 70 us, encoding about 0.7 us a character: a short text is done at once, a longer one must not hold up the streams,
and a huge one must not hold up the long ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

INLINE_CHARACTERS = 512
HUGE_CHARACTERS = 1 << 18
T = TypeVar("T")


class TextPool:
    """A few threads for tokenizing and large bodies, and one more for what is huge."""

    def __init__(self, threads: int = 2) -> None:
        self._long = ThreadPoolExecutor(threads, thread_name_prefix="echelon-text")
        self._huge = ThreadPoolExecutor(1, thread_name_prefix="echelon-huge-text")

    async def run(self, size: int, work: Callable[[], T], *, inline: int = INLINE_CHARACTERS) -> T:
        """The result of `work`, done here when `size` (characters or bytes) is under `inline`, else in a thread."""
        if size < inline:
            return work()
        threads = self._huge if size >= HUGE_CHARACTERS else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def close(self) -> None:
        """Stop the threads; work in progress ends by itself."""
        for threads in (self._long, self._huge):
            threads.shutdown(wait=False, cancel_futures=True)
