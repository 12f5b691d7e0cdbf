"""One replica as the dispatcher sees it: who it is, what it last said, and what was leased to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from router.dispatch.canary import Canary
from router.dispatch.latency import Speed, SpeedModel, blend
from router.dispatch.lease import Acquire, ReplicaRow, ReplicaState, Settle
from router.dispatch.prefixes import PrefixIndex, PromptHashes
from router.qos.queue import Seat
from workers.api.replica import LoadReport, ReplicaInfo

_REPORT_LAG = 0.02  # seconds from a grant until the engine's reports can count it
_HEAD_LAG = 0.1  # seconds from a grant until a report that does not count the request says that it runs
_TRY_NEW = 0.5  # an unmeasured replica is believed to be this much quicker, so that it is tried
_STALE = 10.0  # seconds without a step until what was learned begins to fade, and to have faded
_OBSERVED_STALE = 30.0  # seconds
_HICCUP = 0.05  # seconds that a report may be late for nothing
_MANY_STEPS = 10.0  # without progress for so many predicted steps, a replica is not well
_LATE = 2.0  # times its predicted seconds: a step that took so long says that the next ones will, too
_LAG_SHARE = 0.003  # of a prediction: how far one lease, after the first ones, moves what is learned of its error


@dataclass(slots=True)
class Lease:
    """A request that holds slots and blocks of a replica."""

    request: Acquire
    client: str
    replica_id: str
    arrived: float
    granted: float
    blocks: int = 0
    concurrent: int = 1  # slots in use with it, when it was granted
    seat: Seat = Seat(0, ())  # an engine that knows tiers lets lower ones (greater ranks) yield to it
    is_head: bool = False  # it was granted to wait in the engine, for its account
    first: float = 0.0  # seconds to the first token, as expected when granted, without the learned lag; 0: not known


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request will need, in tokens; `output` is expected and of one choice. `at`: when it asks, in seconds."""

    prefill: int
    output: float
    choices: int
    prompt: PromptHashes | None = None  # to tell what is cached; None = not told
    at: float = 0.0


def blocks_needed(request: Acquire, block_size: int, margin: int) -> int:
    """Blocks to reserve: the prompt once (choices share it), what was emitted, and room to decode for each choice."""
    room = min(margin, request.max_tokens) + block_size - 1
    known = request.prompt_tokens + request.resumed_tokens
    return -(-known // block_size) + request.choices * (room // block_size)


class Replica:
    """The numbers that a decision reads are kept as attributes and refreshed on events, not computed for each request.

    Heads wait in the engine beyond what it has room for: they hold no slots and blocks until it says that they run.

    `free_slots` and `free_blocks` are 0 unless the state is READY. `refresh` puts it into `changed`.
    """

    __slots__ = (
        "block_size", "blocks", "by_rank", "canary", "changed", "draining", "firsts", "fleet", "free_blocks",
        "free_slots", "head_blocks", "head_slots", "heads", "index", "info",
        "kv_seconds", "lag", "late", "leases", "load", "model", "observed", "observed_at", "prefixes", "progress_at",
        "queue_seconds", "recovering", "reported_at", "seq_seconds", "slots", "step_ends", "step_seconds", "suspect",
        "suspect_since", "taught_at", "tiered", "token_seconds", "trusted", "unreported", "unreported_tokens",
    )  # fmt: skip

    def __init__(
        self, info: ReplicaInfo, leases: dict[str, Lease], *, seed: Speed, trusted: bool, now: float, index: int
    ) -> None:
        self.info, self.leases, self.index = info, leases, index
        self.changed: set[Replica] = set()
        self.block_size = info.block_size
        self.load = LoadReport(step=-1)
        self.model = SpeedModel(seed)
        self.trusted = trusted  # the seed was given, not guessed
        self.fleet = seed
        self.draining = self.suspect = self.recovering = False
        self.progress_at = self.taught_at = self.reported_at = now
        self.lag = 0.0  # seconds by which first tokens come later than the rest of the model says
        self.firsts = 0  # leases that it was learned from
        self.late = 1.0  # how many times longer than the model says the last step took, if it was far from it
        self.prefixes = PrefixIndex(info.num_blocks + info.num_host_blocks)
        self.suspect_since: float | None = None  # as the watch saw it
        self.canary = Canary()
        self.slots = self.blocks = 0
        self.head_slots = self.head_blocks = 0  # of them, what heads do not hold yet
        self.by_rank: dict[int, list[int]] = {}  # (slots, blocks) that the others hold, by the rank of their tier
        self.tiered = False  # its engine orders steps by tiers, and reports what it executed
        self.heads: dict[tuple[str, ...], tuple[str, float]] = {}  # by account: the lease that waits there, and since
        for lease_id, lease in leases.items():
            lease.is_head = False  # who waits in an engine that was lost from sight is not known
            self._count(lease_id, lease, 1)
        self.unreported: deque[tuple[float, int]] = deque()  # (granted, prefill tokens) not yet in a report
        self.unreported_tokens = 0
        self.observed: float | None = None  # seconds a lease took for each slot in use
        self.observed_at = now
        self.refresh(now)

    @property
    def state(self) -> ReplicaState:
        """Whether it gets leases."""
        if self.draining:
            return ReplicaState.DRAINING
        return ReplicaState.SUSPECT if self.suspect else ReplicaState.READY

    def refresh(self, now: float) -> None:
        """Recompute what decisions read."""
        self.changed.add(self)
        load, info = self.load, self.info
        speed = self.model.speed
        if not (self.model.known or self.trusted):
            speed = self.fleet.scaled(self.fleet.prefill_rate / _TRY_NEW)
        elif self.model.known and not self.leases:
            speed = blend(speed, self.fleet, min((now - self.taught_at - _STALE) / _STALE, 1.0))
        backlog, kv = load.prefill_backlog + self.unreported_tokens, load.kv_tokens + self.unreported_tokens
        slow, self.step_ends = self._under_way(speed, now)
        step = speed.step(load.running, load.kv_tokens)  # that every chunk of a prefill takes besides its tokens
        chunk = info.max_num_batched_tokens
        self.token_seconds = slow * (1.0 / speed.prefill_rate + (step / chunk if chunk else 0.0))
        self.queue_seconds = backlog * self.token_seconds
        if load.planned_prefill or load.planned_decode:  # it plans ahead: a step that is closed already comes before
            filled = backlog / chunk if chunk else float(backlog > 0)
            self.queue_seconds += slow * step * max(1.0 - filled, 0.0)
        self.seq_seconds, self.kv_seconds = slow * speed.per_seq, slow * speed.per_kv
        self.step_seconds = slow * speed.step(max(load.running, self.slots), kv)
        if self.suspect or self.draining:
            self.free_slots = self.free_blocks = 0
            return
        slots = self.slots - self.head_slots
        blocks = max(self.blocks - self.head_blocks, load.total_blocks - load.free_blocks)
        if self.recovering:  # leases of ingresses that have not come back yet
            slots = max(slots, load.running + load.waiting)
        self.free_slots = info.max_num_seqs - slots
        self.free_blocks = info.num_blocks - blocks

    def room(self, rank: int) -> tuple[int, int]:
        """(slots, blocks) for a lease of the tier `rank`: the free ones, and those of tiers that yield to it."""
        below = [held for other, held in self.by_rank.items() if other > rank] if self.tiered else ()
        if not below or self.state is not ReplicaState.READY:
            return self.free_slots, self.free_blocks
        slots, blocks = sum(held[0] for held in below), sum(held[1] for held in below)
        return self.free_slots + slots, max(
            self.free_blocks, self.info.num_blocks - self.blocks + self.head_blocks + blocks
        )

    def takes_head(self, account: tuple[str, ...]) -> bool:
        """Whether a request of `account` may wait in its engine, so that the policy there knows of it."""
        return self.tiered and self.state is ReplicaState.READY and account not in self.heads

    def waits(self, account: tuple[str, ...], waiting: int, now: float) -> None:
        """So many requests of `account` wait in its engine."""
        head = self.heads.get(account)
        if head is not None and not waiting and now - head[1] > _HEAD_LAG:
            lease_id, _ = head
            lease = self.leases[lease_id]
            self._count(lease_id, lease, -1)
            del self.heads[account]
            self._count(lease_id, lease, 1)
            self.refresh(now)

    def _count(self, lease_id: str, lease: Lease, sign: int) -> None:
        slots, blocks = sign * lease.request.choices, sign * lease.blocks
        self.slots += slots
        self.blocks += blocks
        if self.heads.get(lease.seat.account, ("",))[0] == lease_id:
            self.head_slots += slots
            self.head_blocks += blocks
            return
        held = self.by_rank.setdefault(lease.seat.rank, [0, 0])
        held[0] += slots
        held[1] += blocks
        if not held[0]:
            del self.by_rank[lease.seat.rank]

    def _under_way(self, speed: Speed, now: float) -> tuple[float, float]:
        """(how many times slower than `speed` it is now, when the step under way will have ended).

        A step that is late says so before any report does; it is expected to take as long again as it has.
        """
        load, since = self.load, now - self.reported_at
        if not load.planned_prefill and not load.planned_decode:
            return self.late, self.reported_at
        usual = speed.step(load.planned_decode, load.kv_tokens) + load.planned_prefill / speed.prefill_rate
        seconds = self.late * usual
        if since <= _LATE * seconds + _HICCUP:
            return self.late, self.reported_at + seconds
        return since / usual, now + since

    def _lateness(self, load: LoadReport) -> float:
        """By how many times the step of `load` was longer than the model now says; 1 where that is nothing unusual."""
        speed = self.model.speed
        usual = speed.step(load.decode_tokens, load.kv_tokens) + load.prefill_tokens / speed.prefill_rate
        times = load.step_seconds / usual
        return times if times > _LATE and load.step_seconds > _HICCUP else 1.0

    def uncached(self, demand: Demand) -> int:
        """Prompt tokens of `demand` that are to be computed here: at least one."""
        prompt = demand.prompt
        if prompt is None or prompt.block_size != self.block_size:
            return demand.prefill
        return max(demand.prefill - self.prefixes.cached(prompt), 1)

    def expected(self, demand: Demand) -> float:
        """Seconds until the last token of `demand`, this request counted in."""
        step = self.step_seconds + self.seq_seconds * demand.choices + self.kv_seconds * demand.prefill
        return self.expected_first(demand) + (demand.output - 1.0) * step

    def expected_first(self, demand: Demand) -> float:
        """Seconds until the first token of `demand`: the step under way, the prefills ahead, its own, and a step."""
        step = self.step_seconds + self.seq_seconds * demand.choices + self.kv_seconds * demand.prefill
        wait = max(self.step_ends - demand.at, 0.0) + self.lag
        return max(wait + self.queue_seconds + self.uncached(demand) * self.token_seconds + step, 0.0)

    def add(self, lease_id: str, lease: Lease, prefill: int, now: float) -> None:
        """The lease holds its slots and blocks here from now on."""
        self.leases[lease_id] = lease
        if lease.is_head:
            self.heads[lease.seat.account] = (lease_id, now)
        self._count(lease_id, lease, 1)
        if prefill:
            self.unreported.append((now, prefill))
            self.unreported_tokens += prefill
        self.refresh(now)

    def remove(self, lease_id: str, now: float) -> None:
        """The lease holds nothing any more."""
        lease = self.leases.pop(lease_id)
        self._count(lease_id, lease, -1)
        if self.heads.get(lease.seat.account, ("",))[0] == lease_id:
            del self.heads[lease.seat.account]
        self.refresh(now)

    def report(self, load: LoadReport, now: float) -> None:
        """Take in what the engine said after a step."""
        idle = load.running + load.waiting == 0
        stepped = load.step != self.load.step
        if stepped or not self.load.planned_prefill + self.load.planned_decode:
            self.reported_at = now
        if stepped:
            if self.canary.is_out:
                self.model.observe_canary(load.step_seconds)
            if self.load.step >= 0:  # else it is the first report, of a step long ago
                self.canary.stepped_at = now
            if not self.canary.is_out:  # a prompt of one token says nothing of the speed of others
                self.model.observe(load)
                if load.prefill_tokens + load.decode_tokens:
                    self.taught_at = now
            late = self._lateness(load)
            self.late = min(late, self.late) if self.canary.is_out else late
        if not self.canary.failed and (stepped or (idle and not self.canary.is_out)):
            self.progress_at = now
            self.suspect = False
        self.load = load
        while self.unreported and self.unreported[0][0] <= now - _REPORT_LAG:
            self.unreported_tokens -= self.unreported.popleft()[1]
        self.refresh(now)

    def watch(self, now: float, suspect_seconds: float) -> None:
        """Suspect a replica that makes no progress for much longer than its steps take; let old knowledge fade."""
        if self.info.url:
            self._forget_unreported(now)
        elif now - self.progress_at > max(suspect_seconds, _MANY_STEPS * self._usual_step()):
            self.suspect = True
        if not self.suspect:
            self.suspect_since = None
        elif self.suspect_since is None:
            self.suspect_since = now
        if self.observed is not None and now - self.observed_at > _OBSERVED_STALE:
            self.observed = None
        self.refresh(now)

    def is_hung(self, now: float, seconds: float) -> bool:
        """Whether it has leases and made no step for `seconds`, or ten times what the one under way should take.

        The step under way may have taken in all prompts that it had not told of, as far as one step can.
        """
        if not (self.suspect and self.leases and self.model.known) or self.info.url:
            return False
        load, chunk = self.load, self.info.max_num_batched_tokens
        ahead = load.prefill_backlog + self.unreported_tokens
        prefill = load.planned_prefill + (min(ahead, chunk) if chunk else ahead)
        return now - self.progress_at > max(seconds, _MANY_STEPS * self._usual_step(prefill))

    def _usual_step(self, prefill: int = 0) -> float:
        """Seconds that a step should take, by those before it: were its own lateness in this, it could never hang."""
        speed = self.model.speed if self.model.known or self.trusted else self.fleet
        decode = speed.step(max(self.load.running, self.slots), self.load.kv_tokens)
        return self.late * (decode + prefill / speed.prefill_rate)

    def _forget_unreported(self, now: float) -> None:
        """A foreign server reports nothing: its prefills are taken to be over when they should be."""
        while self.unreported:
            granted, tokens = self.unreported[0]
            if now - granted < tokens * self.token_seconds:
                break
            self.unreported.popleft()
            self.unreported_tokens -= tokens

    def canary_due(self, now: float, every: float) -> bool:
        """Whether it is idle, as far as is known, and nothing has proved it well for `every` seconds."""
        load = self.load
        idle = load.step >= 0 and load.running + load.waiting == 0 and not self.leases
        return idle and not self.draining and self.canary.due(now, every)

    def canary_ended(self, now: float, *, well: bool) -> None:
        """The canary's token came, or an error in its place."""
        self.canary.end(now, well=well)
        self.suspect = not well
        if well:
            self.progress_at = now
        self.refresh(now)

    def hopeless(self, now: float, failures: int, seconds: float) -> str | None:
        """Why it is to be replaced: so many canaries failed, or it was suspect for so long; None while it is not."""
        if self.canary.failures >= failures:
            return f"{self.canary.failures} canaries failed, one after the other"
        if self.suspect_since is not None and now - self.suspect_since >= seconds:
            return f"it has been suspect for {now - self.suspect_since:.0f} s"
        return None

    def observe_lease(self, lease: Lease, now: float) -> None:
        """Learn from a completed lease how long one takes for each slot in use."""
        seconds = (now - lease.granted) / lease.concurrent
        self.observed = seconds if self.observed is None else 0.8 * self.observed + 0.2 * seconds
        self.observed_at = now

    def observe_answer(self, lease: Lease, settled: Settle, now: float) -> None:
        """Learn of a foreign server, which reports no steps, from one answer of it."""
        seconds, each = now - lease.granted, settled.output_tokens / lease.request.choices
        first = settled.first_seconds
        if each >= 2.0:
            began = first if 0.0 < first < seconds else 0.0  # an answer in one piece shows no first token
            step = (seconds - began) / (each - 1.0 if began else each)
            self.model.observe(LoadReport(0, step, decode_tokens=lease.concurrent, running=lease.concurrent))
        if first > 0.0 and settled.prefill_tokens > settled.cached_tokens:
            self.model.observe(LoadReport(0, first, prefill_tokens=settled.prefill_tokens - settled.cached_tokens))
        self.taught_at = now

    def observe_first(self, lease: Lease, seconds: float) -> None:
        """The first token of `lease` came `seconds` after the grant. The lag follows the median of what is unexplained.

        By a small step in the right direction, whatever the size of the error: rare ones are large.
        """
        error = seconds - lease.first - self.lag
        self.firsts += 1
        change = max(_LAG_SHARE, 0.25 / self.firsts) * lease.first
        self.lag += max(min(error, change), -change)

    def row(self, now: float) -> ReplicaRow:
        """For status pages and metrics."""
        return ReplicaRow(
            info=self.info,
            state=self.state,
            load=self.load,
            leases=len(self.leases),
            slots=self.slots,
            prefill_rate=1.0 / self.token_seconds,
            step_seconds=self.step_seconds + self.seq_seconds,
            backlog_seconds=self.queue_seconds,
            since_step=now - self.canary.stepped_at,
        )
