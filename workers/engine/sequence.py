"""One request inside the engine: what is known, what is planned, what is computed, which blocks it holds; and the flow
that it belongs to, which knows it in turn.

Positions are indices of tokens, prompt included. `planned` ones are in submitted steps. A drawn token is on its way to
the host while its sequence is planned on, by position alone: in phases DECODE and ENDING, `planned + 1 - known` tokens
are on their way.
"""

from __future__ import annotations

import enum
import heapq

from workers.api.ordering import Charge
from workers.api.ordering import Flow as Handle
from workers.api.request import EngineRequest, TokenLogprobs
from workers.engine.grammar_state import GrammarState


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
        "first_accounted",
        "flow",
        "grammar",
        "hashes",
        "id",
        "is_part",
        "limit",
        "num_prompt",
        "phase",
        "planned",
        "preemptions",
        "prompt_logprobs",
        "registered",
        "request",
        "slot",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: EngineRequest,
        arrival: int,
        context: int,
        flow: Flow,
        grammar: GrammarState | None = None,
        *,
        is_part: bool = False,
    ) -> None:
        self.id = request.id
        self.request = request
        self.flow = flow
        self.grammar = grammar
        self.is_part = is_part  # of a beam search, which is what the counts of requests know
        self.arrival = arrival  # nobody else's; grows from request to request
        self.num_prompt = len(request.prompt_ids)
        self.limit = min(self.num_prompt + request.sampling.max_tokens, context)  # tokens it can ever have
        self.stop_ids = frozenset(request.sampling.stop_ids)
        self.token_ids = list(request.known_ids)  # prompt, resumed, emitted: all that the host knows
        self.phase = Phase.WAITING
        self.slot = -1
        self.blocks: list[int] = []
        self.planned = 0
        self.hashes: list[bytes] = []  # of its first full blocks, each computed once; they outlive preemption
        self.registered = 0  # full blocks of known tokens, planned or computed in this residency, hits included
        self.preemptions = 0
        # Positions below `accounted` were charged, or found in the cache, once. Running one again is overhead. A replay
        # starts behind its last token: the replica before has run (and charged) the others.
        self.accounted = len(self.token_ids) - 1 if request.resumed_ids else 0
        self.first_accounted = self.accounted
        # Of the prompt's tokens from the second on, as far as they are known; None where nobody waits for them.
        wanted = request.sampling.prompt_logprobs is not None and not request.resumed_ids
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if wanted else None
        self.cached = 0  # prompt tokens below `accounted` that were found in the cache, not run

    @property
    def num_emitted(self) -> int:
        """Tokens of the answer so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt

    @property
    def executed_prefill(self) -> int:
        """Prompt tokens that were run, each counted once."""
        prompt = self.num_prompt
        return min(self.accounted, prompt) - min(self.first_accounted, prompt) - self.cached

    @property
    def executed_decode(self) -> int:
        """Emitted tokens that were run, each counted once; no cache hit is ahead of them."""
        return max(0, self.accounted - max(self.first_accounted, self.num_prompt))

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {self.phase.value}, known={len(self.token_ids)}, planned={self.planned})"


_Waiting = tuple[int, Sequence]  # (arrival, sequence): the preempted came before all that are still fresh


class Flow:
    """The sequences of one flow: those that wait, a heap, and those with a slot; and what a step executed for it."""

    __slots__ = ("charged", "dead", "decode", "handle", "kv_read", "overhead", "prefill", "residents", "waiting")

    def __init__(self, handle: Handle) -> None:
        self.handle = handle  # the policy's
        self.waiting: list[_Waiting] = []
        self.dead = 0  # finished while they waited
        self.residents: dict[Sequence, None] = {}
        self.charged = False  # in the step that is being committed
        self.prefill = self.decode = self.kv_read = self.overhead = 0

    def head(self) -> Sequence | None:
        """Who is admitted next: the first that came."""
        waiting = self.waiting
        while waiting:
            if waiting[0][1].phase is Phase.WAITING:
                return waiting[0][1]
            heapq.heappop(waiting)
            self.dead -= 1
        return None

    def take_charge(self) -> Charge:
        """What was charged, in tokens; then nothing is."""
        charge = Charge(self.handle, self.prefill, self.decode, self.kv_read, self.overhead)
        self.charged = False
        self.prefill = self.decode = self.kv_read = self.overhead = 0
        return charge
