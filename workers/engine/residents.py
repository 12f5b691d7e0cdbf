"""The sequences that hold a slot: their slots, their blocks, and what ranks must be told of both."""

from __future__ import annotations

from collections.abc import Iterator

from workers.engine.block_pool import BlockPool
from workers.engine.plan import ContinuedSequence, NewSequence
from workers.engine.prefix_cache import PrefixCache
from workers.engine.sequence import Phase, Sequence


class Residents:
    """Sequences by phase, each dict in order of entry. Slots and blocks go in and out here and nowhere else.

    The next plan may take a released block while the step in flight still writes to it: ranks run plans in order.
    """

    def __init__(self, pool: BlockPool, block_size: int, max_num_seqs: int) -> None:
        self.prefilling: dict[Sequence, None] = {}
        self.decoding: dict[Sequence, None] = {}
        self.ending: dict[Sequence, None] = {}
        self.kv_tokens = 0  # planned positions of all of them
        self.max_num_seqs = max_num_seqs
        self._by_phase = {Phase.PREFILL: self.prefilling, Phase.DECODE: self.decoding, Phase.ENDING: self.ending}
        self._pool = pool
        self._block_size = block_size
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._removed: list[int] = []
        self._continued: dict[Sequence, ContinuedSequence] = {}

    def __len__(self) -> int:
        return self.max_num_seqs - len(self._slots)

    def __iter__(self) -> Iterator[Sequence]:
        for group in self._by_phase.values():
            yield from group

    @property
    def free_slots(self) -> int:
        """How many more sequences may enter."""
        return len(self._slots)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self._block_size)

    def enter(self, sequence: Sequence, hits: list[int], cache: PrefixCache) -> NewSequence:
        """The sequence gets a slot and holds `hits`, blocks that `cache` found, and what it can restore behind them."""
        for block in hits:
            self._pool.share(block)
        cache.restore(sequence, hits)
        sequence.slot = self._slots.pop()
        sequence.blocks = hits
        sequence.registered = len(hits)
        sequence.planned = len(hits) * self._block_size
        self.kv_tokens += sequence.planned
        sequence.phase = Phase.PREFILL
        self.prefilling[sequence] = None
        request = sequence.request
        return NewSequence(
            slot=sequence.slot,
            token_ids=tuple(sequence.token_ids),
            num_prompt=sequence.num_prompt,
            sampling=request.sampling,
            blocks=tuple(hits),
            adapter=request.adapter,
            masked=sequence.grammar is not None,
        )

    def grow(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """`count` more positions are planned; returns the blocks taken for them (the caller knows that they exist)."""
        sequence.planned += count
        self.kv_tokens += count
        missing = self.blocks_for(sequence.planned) - len(sequence.blocks)
        if missing <= 0:
            return ()
        blocks = tuple(self._pool.take() for _ in range(missing))
        sequence.blocks.extend(blocks)
        return blocks

    def go_on(self, sequence: Sequence, source: Sequence, token: int) -> None:
        """Instead of with the token that it drew, `sequence` goes on with `token` behind all that `source`, of the same
        length, has. Neither has gone on since its draw.
        """
        if sequence is not source:
            full = source.planned // self._block_size
            common = next((i for i in range(full) if sequence.blocks[i] != source.blocks[i]), full)
            for block in source.blocks[common:full]:
                self._pool.share(block)
            self._pool.release(reversed(sequence.blocks[common:full]))
            sequence.blocks[common:full] = source.blocks[common:full]
            sequence.token_ids[sequence.num_prompt :] = source.token_ids[source.num_prompt :]
            sequence.hashes = source.hashes[:full]
            sequence.registered = full
        sequence.token_ids.append(token)
        sequence.limit += 1
        self._continued[sequence] = ContinuedSequence(sequence.slot, source.slot, sequence.planned, token)
        self.move(sequence, Phase.PREFILL)

    def put_back(self, sequence: Sequence) -> None:
        """The last position of a decode is not planned any more; its block stays."""
        sequence.planned -= 1
        self.kv_tokens -= 1
        if sequence.phase is Phase.ENDING:
            self.move(sequence, Phase.DECODE)

    def move(self, sequence: Sequence, phase: Phase) -> None:
        """From one resident phase to another."""
        del self._by_phase[sequence.phase][sequence]
        self._by_phase[phase][sequence] = None
        sequence.phase = phase

    def leave(self, sequence: Sequence) -> None:
        """It gives back slot and blocks (its registered ones stay cached); the caller sets the new phase."""
        del self._by_phase[sequence.phase][sequence]
        self._continued.pop(sequence, None)
        self._pool.release(reversed(sequence.blocks))
        self._removed.append(sequence.slot)
        self._slots.append(sequence.slot)
        self.kv_tokens -= sequence.planned
        sequence.blocks = []
        sequence.slot = -1
        sequence.planned = 0

    def take_continued(self) -> tuple[ContinuedSequence, ...]:
        """Those that `go_on` since the last plan and are still here, for the next one."""
        continued = tuple(self._continued.values())
        self._continued.clear()
        return continued

    def take_removed(self) -> tuple[int, ...]:
        """Slots emptied since the last plan, for the next one."""
        removed = tuple(self._removed)
        self._removed.clear()
        return removed
