"""What is known of one foreign server, and how it is asked for its models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from router.foreign.upstream import Deadlines, Upstream
from workers.api.errors import NodeFailed
from workers.api.replica import ReplicaInfo

MOST_MODELS = 1000
_MOST_LIST_BYTES = 1 << 20
_UNKNOWN = 1 << 30  # tokens, blocks: a foreign server sees to its own limits
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A server at `url` (without `/v1`). `speed` seeds what is learned of it, in prompt tokens a second.

    `key` is the API key that it wants of us; a client's own key is never handed on.
    """

    url: str
    models: tuple[str, ...] = ()  # empty: what it lists
    speed: float | None = None
    key: str = field(default="", repr=False)
    slots: int = 256  # requests at once


def node_info(spec: NodeSpec, model: str) -> ReplicaInfo:
    """The node's row in the dispatcher's table, for one of its models."""
    return ReplicaInfo(
        id=f"{spec.url}#{model}",
        model=model,
        host="",
        port=0,
        max_model_len=_UNKNOWN,
        max_num_seqs=spec.slots,
        num_blocks=_UNKNOWN,
        block_size=_BLOCK,
        url=spec.url,
        key=spec.key,
    )


def key_header(key: str) -> dict[str, str]:
    """The header that shows `key`, if there is one."""
    return {"authorization": f"Bearer {key}"} if key else {}


async def list_models(url: str, key: str, deadlines: Deadlines) -> tuple[str, ...]:
    """Names that GET /v1/models of `url` gives. Raises NodeFailed for anything else than a list with some."""
    answer = await Upstream.open("GET", f"{url}/v1/models", headers=key_header(key), deadlines=deadlines)
    try:
        body = await answer.whole(_MOST_LIST_BYTES)
    finally:
        await answer.close()
    if answer.status != 200:
        raise NodeFailed(f"answers GET /v1/models with {answer.status}", answered=True)
    try:
        names = [card["id"] for card in json.loads(body)["data"]]
    except (ValueError, TypeError, KeyError) as e:
        raise NodeFailed("GET /v1/models gives no list of models", answered=True) from e
    if not names or not all(isinstance(name, str) and name for name in names):
        raise NodeFailed("GET /v1/models names no model", answered=True)
    return tuple(names[:MOST_MODELS])
