"""One request inside the engine: what is known, what is planned, what is computed, which blocks it holds.

Positions are indices of tokens, prompt included. For a sequence that holds a slot:

    computed <= planned <= known + pending

`planned` positions are in submitted steps, `computed` ones in committed steps; `pending` tokens are drawn by a step
whose result the host has not seen.
"""

from __future__ import annotations

import enum

from workers.api.request import EngineRequest


class Phase(enum.Enum):
    """Where a sequence is. All but WAITING and FINISHED hold a slot and blocks."""

    WAITING = "waiting"
    PREFILL = "prefill"  # known tokens are still to be planned
    DECODE = "decode"  # every known token is planned; one more a step
    ENDING = "ending"  # its last token is on its way: nothing is left to plan
    FINISHED = "finished"


class Sequence:
    """The mutable state of one request; only the scheduler and the residents change it."""

    __slots__ = (
        "accounted",
        "arrival",
        "blocks",
        "cached",
        "computed",
        "executed_decode",
        "executed_prefill",
        "hashes",
        "id",
        "limit",
        "num_prompt",
        "pending",
        "phase",
        "planned",
        "preemptions",
        "registered",
        "request",
        "slot",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, arrival: int, context: int) -> None:
        self.id = request.id
        self.request = request
        self.arrival = arrival  # grows from request to request
        self.num_prompt = len(request.prompt_ids)
        self.limit = min(self.num_prompt + request.sampling.max_tokens, context)  # tokens it can ever have
        self.stop_ids = frozenset(request.sampling.stop_ids)
        self.token_ids = list(request.known_ids)  # prompt, resumed, emitted: all that the host knows
        self.phase = Phase.WAITING
        self.slot = -1
        self.blocks: list[int] = []
        self.planned = 0
        self.computed = 0
        self.pending = 0
        self.hashes: list[bytes] = []  # of its first full blocks, each computed once; they outlive preemption
        self.registered = 0  # blocks offered to the prefix cache in this residency, hits included
        self.preemptions = 0
        # Positions below `accounted` were charged, or found in the cache, once. Running one again is overhead. A replay
        # starts behind its last token: the replica before has run (and charged) the others.
        self.accounted = len(self.token_ids) - 1 if request.resumed_ids else 0
        self.cached = 0  # prompt tokens that need not be run at all
        self.executed_prefill = 0
        self.executed_decode = 0

    @property
    def num_emitted(self) -> int:
        """Tokens of the answer so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {self.phase.value}, known={len(self.token_ids)}, planned={self.planned})"
