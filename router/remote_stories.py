"""`router.http.stories.Stories` at the dispatcher, which hears of all fronts' requests."""

from __future__ import annotations

from router.dispatch.client import DispatcherClient
from router.dispatch.lease import AskStory, Ended, Story
from workers.api.errors import NoReplica

ASK_SECONDS = 2.0


class RemoteStories:
    """Over `client`. Without a dispatcher nothing is remembered."""

    def __init__(self, client: DispatcherClient) -> None:
        self._client = client

    def ended(self, request: Ended) -> None:
        """See `Stories`."""
        self._client.tell(request)

    async def story(self, owner: str | None, request_id: str) -> bytes:
        """See `Stories`."""
        try:
            answer = await self._client.ask(lambda number: AskStory(number, owner, request_id), ASK_SECONDS)
        except ConnectionError as e:
            raise NoReplica(f"requests cannot be looked up: {e}", retry_after=2.0) from e
        assert isinstance(answer, Story)
        return answer.body
