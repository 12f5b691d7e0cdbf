"""What a replica says of itself: while it starts (`Stage`), once (`ReplicaInfo`) and every step (`LoadReport`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.api.request import RequestCounts

BYTES = "bytes"
_SCALES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))


@dataclass(frozen=True, slots=True)
class Stage:
    """What the start of a rank is at; where that can be counted, `done` of `total` (0: unknown) in `unit`."""

    name: str
    done: int = 0
    total: int = 0
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.count}" if self.count else self.name

    @property
    def count(self) -> str:
        """How far it is, in words; empty where that is unknown."""
        if not (self.done or self.total):
            return ""
        scale, unit = 1.0, self.unit
        if unit == BYTES:
            scale, unit = next(((s, u) for s, u in _SCALES if max(self.done, self.total) >= s), (1.0, BYTES))
        done, total = (f"{n / scale:.1f}" if scale > 1.0 else str(n) for n in (self.done, self.total))
        return f"{done} of {total} {unit}" if self.total else f"{done} {unit}"


UP = Stage("up")  # the last one


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """One replica as the dispatcher's table holds it. `id` is unique for ever: it is the generation too."""

    id: str
    model: str
    host: str
    port: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    node: str = ""
    pid: int = 0
    max_num_batched_tokens: int = 0  # of a step; 0 = not told
    url: str = ""  # of a foreign server, which is reached by HTTP and reports nothing; empty: a replica of ours
    key: str = field(default="", repr=False)  # that the foreign server wants
    num_host_blocks: int = 0  # that evicted blocks are copied to
    prompts_apart_from: int | None = None  # tokens; see `workers.api.hashing.prompt_salt`


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The state of an engine after a step. Token counts are of this step unless named otherwise."""

    step: int  # steps completed since the start; grows while there is progress
    step_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    overhead_tokens: int = 0  # recomputed or discarded in this step
    running: int = 0  # sequences with a slot
    waiting: int = 0
    prefill_backlog: int = 0  # prompt tokens not yet computed, of all waiting and running sequences
    kv_tokens: int = 0  # tokens held by running sequences
    free_blocks: int = 0  # free or evictable
    total_blocks: int = 0
    preemptions: int = 0  # since the start
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, since the start
    prefix_hits: int = 0  # and found, on the device or in host memory
    executed_tokens: int = 0  # since the start, recomputed and discarded ones too
    requests: RequestCounts = RequestCounts()
    planned_prefill: int = 0  # of the step under way, whose tokens are in no backlog any more
    planned_decode: int = 0
    steps_cut: int = 0  # since the start: steps that the device had no memory for as a whole
    host_blocks: int = 0  # of host memory that hold what was evicted
    total_host_blocks: int = 0
    copied_out: int = 0  # blocks since the start, to host memory
    copied_in: int = 0  # and back
    host_hits: int = 0  # tokens of prefix_hits that were in host memory alone


@dataclass(frozen=True, slots=True)
class CacheNews:
    """What a prefix cache has gained and lost since the last news; of blocks, the first SHORT_BYTES of their hashes.

    `anew`: it begins from nothing, whatever was told before.
    """

    gained: bytes = b""
    lost: bytes = b""
    anew: bool = False
