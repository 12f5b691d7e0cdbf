"""What must add up at any instant between two calls: blocks and requests. Every test of the engine ends with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Phase, Sequence


def check_ledgers(scheduler: Scheduler, live: Mapping[str, Sequence]) -> None:
    """Raises AssertionError unless both ledgers are balanced."""
    check_blocks(scheduler)
    check_requests(scheduler, live)


def check_blocks(scheduler: Scheduler) -> None:
    """free + held + idle == total, references == holders, and only registered full blocks are shared or idle."""
    residents, block_size = scheduler.residents, scheduler.block_size
    holders: Counter[int] = Counter()
    for sequence in residents:
        holders.update(sequence.blocks)
        assert len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence} holds a block twice: {sequence.blocks}"
        needed = residents.blocks_for(sequence.planned)
        assert len(sequence.blocks) == needed, f"{sequence} holds {len(sequence.blocks)} blocks, needs {needed}"
        for index, block in enumerate(sequence.blocks):
            if scheduler.pool.refs(block) > 1:
                assert (index + 1) * block_size <= sequence.computed, f"{sequence} shares block {block}, not yet full"
    scheduler.pool.check(dict(holders))
    scheduler.cache.check()
    kv_tokens = sum(s.planned for s in residents)
    assert residents.kv_tokens == kv_tokens, f"kv_tokens is {residents.kv_tokens}, residents hold {kv_tokens}"


def check_requests(scheduler: Scheduler, live: Mapping[str, Sequence]) -> None:
    """accepted == completed + aborted + failed + live; the live are waiting or resident, once; work adds up."""
    residents, stats = scheduler.residents, scheduler.stats
    counts = stats.requests(len(live))
    assert counts.balanced, f"request ledger: {counts}"
    waiting, resident = list(scheduler.queue), list(residents)
    assert len(waiting) == len(scheduler.queue), f"{len(waiting)} wait, the queue says {len(scheduler.queue)}"
    where = Counter(s.id for s in (*waiting, *resident))
    assert where == Counter(live.keys()), f"live {sorted(live)}, waiting or resident {sorted(where.elements())}"
    assert all(live[s.id] is s for s in (*waiting, *resident)), "a request id stands for two sequences"
    slots = [s.slot for s in resident]
    assert len(slots) == len(set(slots)) == len(residents), f"slots {slots}, {len(residents)} are taken"
    for sequence in waiting:
        held = (sequence.slot, sequence.blocks, sequence.planned)
        assert held == (-1, [], 0), f"{sequence} waits but holds (slot, blocks, planned) {held}"
    for sequence in resident:
        known = len(sequence.token_ids) + sequence.pending
        ahead = known - sequence.planned
        assert sequence.computed <= sequence.planned < known <= sequence.limit, (
            f"{sequence}: computed {sequence.computed}, pending {sequence.pending}, limit {sequence.limit}"
        )
        assert ahead == 1 or sequence.phase is Phase.PREFILL, f"{sequence} has {ahead} tokens to plan"
    backlog = sum(len(s.token_ids) for s in waiting)
    backlog += sum(len(s.token_ids) - s.planned for s in residents.prefilling)
    assert scheduler.backlog == backlog, f"prefill backlog is {scheduler.backlog}, counted {backlog}"
    work = stats.prefill + stats.decode + stats.overhead
    assert stats.executed == work, f"{stats.executed} tokens executed, {work} accounted for"
