"""Where it is remembered what became of requests, for all fronts."""

from __future__ import annotations

from typing import Protocol

from router.dispatch.lease import Ended


class Stories(Protocol):
    """`router.remote_stories` is the real one."""

    def ended(self, request: Ended) -> None:
        """A request is over for its client."""

    async def story(self, owner: str | None, request_id: str) -> bytes:
        """JSON of what became of a request of `owner` (None: of anybody); empty where nothing is known.

        Raises NoReplica where it cannot be asked.
        """
