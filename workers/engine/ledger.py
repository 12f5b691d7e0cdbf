"""What must add up at any instant between two calls: blocks and requests. Every test of the engine ends with it."""

from __future__ import annotations

from collections import Counter

from workers.engine.roster import Roster
from workers.engine.sequence import Phase


def check_ledgers(roster: Roster) -> None:
    """Raises AssertionError unless both ledgers are balanced."""
    check_blocks(roster)
    check_requests(roster)


def check_blocks(roster: Roster) -> None:
    """free + held + idle == total, references == holders, and only registered full blocks are shared or idle."""
    residents = roster.residents
    holders: Counter[int] = Counter()
    for sequence in residents:
        holders.update(sequence.blocks)
        assert len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence} holds a block twice: {sequence.blocks}"
        needed = residents.blocks_for(sequence.planned)
        allowed = {needed, residents.blocks_for(sequence.planned + (sequence.grammar is not None))}  # put off, perhaps
        assert len(sequence.blocks) in allowed, f"{sequence} holds {len(sequence.blocks)} blocks, needs {needed}"
        for index, block in enumerate(sequence.blocks):
            if roster.pool.refs(block) > 1:
                assert index < sequence.registered, f"{sequence} shares block {block}, not yet full"
    roster.pool.check(dict(holders))
    roster.cache.check()
    kv_tokens = sum(s.planned for s in residents)
    assert residents.kv_tokens == kv_tokens, f"kv_tokens is {residents.kv_tokens}, residents hold {kv_tokens}"


def check_requests(roster: Roster) -> None:
    """accepted == completed + aborted + failed + live; the live are waiting or resident, once; work adds up."""
    residents, stats, live = roster.residents, roster.stats, roster.live
    counts = stats.requests(roster.num_requests)
    assert counts.balanced, f"request ledger: {counts}"
    parts = sum(s.is_part for s in live.values())
    assert roster.parts == parts, f"{roster.parts} parts of beam searches, counted {parts}"
    assert (roster.searches > 0) == (parts > 0), f"{roster.searches} beam searches have {parts} parts"
    waiting, resident = list(roster.queue), list(residents)
    assert len(waiting) == len(roster.queue), f"{len(waiting)} wait, the queue says {len(roster.queue)}"
    where = Counter(s.id for s in (*waiting, *resident))
    assert where == Counter(live.keys()), f"live {sorted(live)}, waiting or resident {sorted(where.elements())}"
    assert all(live[s.id] is s for s in (*waiting, *resident)), "a request id stands for two sequences"
    slots = [s.slot for s in resident]
    assert len(slots) == len(set(slots)) == len(residents), f"slots {slots}, {len(residents)} are taken"
    for sequence in waiting:
        held = (sequence.slot, sequence.blocks, sequence.planned)
        assert held == (-1, [], 0), f"{sequence} waits but holds (slot, blocks, planned) {held}"
    for sequence in resident:
        unseen = sequence.planned + 1 - len(sequence.token_ids)  # drawn, on their way to the host
        if sequence.phase is Phase.PREFILL:
            assert unseen <= 0, f"{sequence} has nothing left to prefill"
        else:
            assert 0 <= unseen <= roster.in_flight, f"{sequence}: {unseen} tokens drawn in {roster.in_flight} steps"
        ending = sequence.planned + 1 >= sequence.limit
        assert ending == (sequence.phase is Phase.ENDING), f"{sequence}: its limit is {sequence.limit}"
    backlog = sum(len(s.token_ids) for s in waiting)
    backlog += sum(len(s.token_ids) - s.planned for s in residents.prefilling)
    assert roster.backlog == backlog, f"prefill backlog is {roster.backlog}, counted {backlog}"
    work = stats.prefill + stats.decode + stats.overhead
    assert stats.executed == work, f"{stats.executed} tokens executed, {work} accounted for"
