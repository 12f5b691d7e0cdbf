"""Dispatch by expected latency for plain `DeploymentHandle` users, as Ray Serve's `RequestRouter`.

    @serve.deployment(request_router_config=RequestRouterConfig(
        request_router_class="cluster.request_router:ExpectedLatencyRouter",
        request_router_kwargs={"strategy": "min_expected_latency"}))

Serve has one router in each process that holds a handle, so each sees its own calls only, and the replicas' stats some
tenths of a second late. Echelon's own front does not use it: the dispatcher sees all. Alpha API of Ray 2.60.
"""

from __future__ import annotations

import time
from random import Random
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.dispatch.calls import CallPolicy

CHARACTERS_PER_TOKEN = 4


class ExpectedLatencyRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Ranks replicas by `strategy`, a name of `router.dispatch.strategies`. Serve tries them in that order."""

    def initialize_state(self, strategy: str = "min_expected_latency", seed: int | None = None) -> None:
        """Serve calls this once, with `request_router_kwargs`. Raises ConfigError for an unknown strategy."""
        self._policy = CallPolicy(strategy, clock=time.monotonic, rng=Random(seed))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Those with room, best first, each a rank of its own: inside a rank Serve goes by queue length."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve spins while all are full
        standing = {r.replica_id.unique_id: r for r in self.curr_replicas.values()}
        self._policy.update({i: (r.max_ongoing_requests, r.routing_stats or {}) for i, r in standing.items()})
        free = [r.replica_id.unique_id for r in self.select_available_replicas(candidate_replicas)]
        order = self._policy.order([i for i in free if i in standing], prompt_tokens(pending_request))
        return [[standing[i]] for i in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has the call."""
        call = pending_request.metadata.internal_request_id
        self._policy.began(call, replica_id.unique_id, prompt_tokens(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The call is over."""
        self._policy.ended(internal_request_id)


def prompt_tokens(request: PendingRequest | None) -> int:
    """Of a call's first argument: a list's length, or an estimate for text."""
    if request is None or not request.args:
        return 0
    first = request.args[0]
    if isinstance(first, str):
        return len(first) // CHARACTERS_PER_TOKEN + 1
    return len(first) if isinstance(first, list | tuple) else 0
