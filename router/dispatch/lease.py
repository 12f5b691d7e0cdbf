"""The dispatcher's wire: what ingress replicas and the dispatcher say to each other.

The first message of an ingress on every connection is `Reregister`, which is complete: what the dispatcher holds for
that ingress and the message does not name has ended. An ingress is known by the name in its Hello.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from router.dispatch.prefixes import PromptHashes
from router.dispatch.rounds import (
    BeginRound,
    CancelRound,
    EndRound,
    HoldRound,
    RoundBegun,
    RoundCancelled,
    SessionCounts,
    StopRound,
)
from workers.api.replica import LoadReport, ReplicaInfo
from workers.api.wire import BASE_MESSAGES, FrameCodec


class Refusal(enum.StrEnum):
    """Why there is no lease."""

    UNKNOWN_MODEL = "unknown_model"
    INVALID = "invalid"  # no replica of the model could ever hold it
    CONTEXT = "context"  # the prompt is longer than the model's context
    OVERLOADED = "overloaded"
    NO_REPLICA = "no_replica"


class Outcome(enum.StrEnum):
    """How the work of a lease ended."""

    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"
    LOST = "lost"  # the ingress lost its connection to the replica


class ReplicaState(enum.StrEnum):
    """Whether a replica gets new leases: only READY ones do."""

    READY = "ready"
    SUSPECT = "suspect"  # no progress for a while, or out of an ingress's reach; a report of progress ends it
    DRAINING = "draining"  # finishes what it has


@dataclass(frozen=True, slots=True)
class Acquire:
    """Ask for a lease: `choices` slots on one replica of `model`.

    Counts are in tokens. `resumed_tokens` were emitted before a replay, summed over the choices. `age` is the time in
    seconds since the request first came, so that replays and re-registered requests keep their place. An `accepted`
    request is a replay: it is never refused for a full queue.
    """

    lease_id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    choices: int = 1
    owner: str = "default"
    tier: str = ""
    sub: str = ""  # which of the owner's own users asks
    name: str = ""  # the generation request's: what it starts with is the id that its client knows; empty = not told
    route: str = ""
    resumed_tokens: int = 0
    accepted: bool = False
    age: float = 0.0
    excluded: tuple[str, ...] = ()  # replica ids, avoided while another replica is registered
    prompt: PromptHashes | None = None  # None = not told
    foreign: bool = False  # whether a foreign server may have it: who asks knows how to talk to one
    priority: int = 0  # among the requests of one owner, and sub-user, the least goes first


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease stands; submit to `replica`."""

    lease_id: str
    replica: ReplicaInfo
    expected_seconds: float  # to the last token, as predicted when granted
    waited_seconds: (
        float  # since it came, or another one of its owner's, whose place it has taken, as its priority says
    )
    first_seconds: float = 0.0  # to the first token, as predicted when granted
    cached_tokens: int = 0  # of the prompt, as predicted when granted


@dataclass(frozen=True, slots=True)
class Refused:
    """There will be no lease. `retry_after` is in seconds, for OVERLOADED and NO_REPLICA.

    OVERLOADED by a full queue also tells where the request would have stood (0: not known), and how many seconds it
    would have waited: at least, probably, at most.
    """

    lease_id: str
    reason: Refusal
    message: str
    retry_after: float = 1.0
    position: int = 0
    wait: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Settle:
    """The lease has ended; the counts are tokens, summed over its choices."""

    lease_id: str
    outcome: Outcome
    prefill_tokens: int = 0  # executed
    decode_tokens: int = 0  # executed
    cached_tokens: int = 0
    output_tokens: int = 0  # emitted under this lease
    first_seconds: float = 0.0  # from the grant to the first token; 0: none came
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """The ingress no longer wants the lease, granted or not."""

    lease_id: str


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that its ingress holds."""

    request: Acquire
    replica_id: str


@dataclass(frozen=True, slots=True)
class Reregister:
    """All that this ingress holds and waits for, oldest first."""

    held: tuple[HeldLease, ...] = ()
    waiting: tuple[Acquire, ...] = ()


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The replica is gone and the lease with it. `died`: it broke, it was not taken out on purpose."""

    lease_id: str
    replica_id: str
    reason: str
    died: bool


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One replica as status pages and metrics show it."""

    info: ReplicaInfo
    state: ReplicaState
    load: LoadReport
    leases: int
    slots: int  # held by leases
    prefill_rate: float  # tokens a second, learned
    step_seconds: float  # of the next decode step, learned
    backlog_seconds: float  # of prefill ahead of a new request
    since_step: float  # seconds since it completed a step, a canary's too; infinite before the first one


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier of one model's queue; see `router.qos.queue.TierState` and `router.qos.watch.Reading`."""

    model: str
    tier: str
    waiting: int
    oldest_seconds: float
    expected_seconds: float  # that one more request would wait
    gap: float
    gap_bound: float
    share_error: float
    violations: int


@dataclass(frozen=True, slots=True)
class WorkRow:
    """Tokens that replicas reported as executed for the users of a tier, or for nobody: then `tier` is empty."""

    model: str
    tier: str
    kind: str  # prefill | decode | overhead
    tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaTable:
    """All replicas, after a change and about twice a second."""

    rows: tuple[ReplicaRow, ...]
    waiting: int  # requests without a lease
    waiting_by_model: tuple[tuple[str, int], ...] = ()
    tiers: tuple[TierRow, ...] = ()
    work: tuple[WorkRow, ...] = ()
    sessions: SessionCounts = SessionCounts()


@dataclass(frozen=True, slots=True)
class FrontPage:
    """The metrics of the front that sends this, in Prometheus' text format, for whoever asks."""

    page: bytes


@dataclass(frozen=True, slots=True)
class AskPages:
    """What the other fronts' last pages are; answered by `FrontPages` of the same number."""

    number: int


@dataclass(frozen=True, slots=True)
class FrontPages:
    """Each other front's name and page."""

    number: int
    pages: tuple[tuple[str, bytes], ...]


class Verdict(enum.StrEnum):
    """What a claim of an idempotency key comes to."""

    FIRST = "first"  # run it, and send `Keep` at the end
    KEPT = "kept"  # here is the answer
    RUNNING = "running"
    OTHER_BODY = "other_body"
    FULL = "full"  # too many run


@dataclass(frozen=True, slots=True)
class Claim:
    """A request with an idempotency key came. `key` and `body` are digests; with `wait`, one that runs is awaited."""

    number: int  # of the verdict; 0 = it runs here since before the connection was made: no verdict
    key: bytes
    body: bytes
    wait: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """The verdict on the claim of this number."""

    number: int
    key: bytes
    verdict: Verdict
    answer: bytes = b""


@dataclass(frozen=True, slots=True)
class Keep:
    """What was claimed has ended, with this answer; an empty one is not kept."""

    key: bytes
    body: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over for its client. `parts` are the spans of its time, in seconds; their sum is all of it."""

    request_id: str
    owner: str
    outcome: str
    parts: tuple[tuple[str, float], ...]
    first_seconds: float | None  # from when it came to its first token
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class AskStory:
    """What became of a request; `owner` None = whosever it was. Answered by `Story` of the same number."""

    number: int
    owner: str | None
    request_id: str


@dataclass(frozen=True, slots=True)
class AskActivity:
    """Who waits, and who is served; see `router.dispatch.activity`. Answered by `Story` of the same number.

    `owner` None: all of it, for an operator; else how the owner stands, whose API key says `tier`.
    """

    number: int
    owner: str | None
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Story:
    """JSON; empty where nothing is known."""

    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class AddNode:
    """Dispatch to the foreign server at `url`, too; answered by `NodeAnswer`, unless `number` is 0. See `NodeSpec`."""

    number: int
    url: str
    models: tuple[str, ...] = ()
    speed: float | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """Dispatch to the foreign server at `url` no more; answered by `NodeAnswer`."""

    number: int
    url: str


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """It is done, or `fault` says why not."""

    number: int
    fault: str = ""


DISPATCH_CODEC = FrameCodec(
    {
        **BASE_MESSAGES,
        16: Acquire,
        17: Granted,
        18: Refused,
        19: Settle,
        20: Cancel,
        21: Reregister,
        22: LeaseLost,
        23: ReplicaTable,
        24: FrontPage,
        25: AskPages,
        26: FrontPages,
        27: Claim,
        28: Claimed,
        29: Keep,
        30: AddNode,
        31: RemoveNode,
        32: NodeAnswer,
        40: Ended,
        41: AskStory,
        42: Story,
        43: AskActivity,
        50: BeginRound,
        51: RoundBegun,
        52: EndRound,
        53: HoldRound,
        54: CancelRound,
        55: RoundCancelled,
        56: StopRound,
    }
)
