"""Which blocks hold which prefixes. A block's hash covers all before it (`workers.api.hashing`), so a hit is exact.

A block is registered once it is full, its tokens are known and a plan says to compute it; it is never written again.
Plans run in their order, and in every layer a step stores all its keys and values before any of its queries reads some:
so a sequence may hit, even in the same step, what another one is about to compute, and a prefix that many requests
bring at once is computed once. The hashes of what a plan computes are made only when somebody looks for a prefix, or
once the step is submitted: some 2 us a block that the device need not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable

from workers.api.hashing import extend_hash, prompt_salt, root_hash
from workers.engine.block_pool import BlockPool
from workers.engine.cache_journal import CacheJournal
from workers.engine.host_blocks import HostBlocks
from workers.engine.sequence import Sequence


class PrefixCache:
    """Hash -> block, one block a hash. Switched off it finds nothing and registers nothing.

    What is evicted is still to be had where `host` has blocks: `restore` brings it back. `prompts_apart_from`: see
    `Engine`.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        enabled: bool = True,
        host: HostBlocks | None = None,
        prompts_apart_from: int | None = None,
    ) -> None:
        self.enabled, self._apart_from = enabled, prompts_apart_from
        self._pool = pool
        self._block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._planned: list[tuple[Sequence, int]] = []  # arguments of `plan`, not yet registered
        self.host = HostBlocks(0) if host is None else host
        self.journal = CacheJournal(self._held, 4 * (pool.num_blocks + self.host.num_blocks))
        if self.host.num_blocks:
            pool.on_reuse.append(self._save)
        pool.on_evict.append(self._evicted)

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the longest known prefix, first to last; never all of it: one token is left to run.

        Takes no reference. Nothing is found for a sequence whose prompt's log-probabilities are wanted: they come of
        tokens that are run.
        """
        hits: list[int] = []
        if not self.enabled or sequence.prompt_logprobs is not None:
            return hits
        self.settle()
        for index in range((len(sequence.token_ids) - 1) // self._block_size):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def restore(self, sequence: Sequence, hits: list[int]) -> None:
        """`hits`, of which the sequence is a holder, grow by blocks whose content the next plan copies back from the
        host. Ends like `match`. There must be free or idle blocks for all of the sequence.
        """
        if not len(self.host) or sequence.prompt_logprobs is not None:
            return
        for index in range(len(hits), (len(sequence.token_ids) - 1) // self._block_size):
            digest = self._hash(sequence, index)
            block = self._block_of.get(digest)
            if block is not None:  # behind one that was evicted
                self._pool.share(block)
            elif digest in self.host:
                self.host.hold(digest)
                block = self._pool.take()
                self.host.restore(digest, block)
                self._block_of[digest] = block
                self._hash_of[block] = digest
                self._pool.keep(block)
            else:
                break
            hits.append(block)

    def plan(self, sequence: Sequence, planned: int) -> None:
        """As `register`, at the latest with the next call of `settle`, until when the sequence must keep its blocks."""
        if self.enabled:
            self._planned.append((sequence, planned))

    def settle(self) -> None:
        """All that was planned is registered."""
        for sequence, planned in self._planned:
            self.register(sequence, planned)
        self._planned.clear()

    def register(self, sequence: Sequence, planned: int) -> None:
        """The full blocks among the first `planned` positions can be hit. A hash keeps the block that it has."""
        full = max(planned // self._block_size, sequence.registered)
        for index in range(sequence.registered, full) if self.enabled else ():
            digest = self._hash(sequence, index)
            if digest not in self._block_of:
                block = sequence.blocks[index]
                self._block_of[digest] = block
                self._hash_of[block] = digest
                self._pool.keep(block)
                self.journal.gained(digest)
        sequence.registered = full

    def forget(self, sequence: Sequence) -> None:
        """No later request hits what this one has computed or used: its numbers are not to be trusted."""
        for digest in sequence.hashes:
            if self.host.drop(digest) and digest not in self._block_of:
                self.journal.lost(digest)
            block = self._block_of.get(digest)
            if block is not None:
                self._pool.drop(block)

    def clear(self) -> None:
        """Nothing is cached any more."""
        for block in list(self._hash_of):
            self._pool.drop(block)
        for digest in self.host.digests:
            self.host.drop(digest)
            self.journal.lost(digest)

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        # Asked for in order, so at most one is missing.
        hashes = sequence.hashes
        if index == len(hashes):
            request = sequence.request
            salt = prompt_salt(request.salt, sequence.num_prompt, self._apart_from)
            parent = hashes[-1] if hashes else root_hash(salt, request.adapter)
            start = index * self._block_size
            hashes.append(extend_hash(parent, sequence.token_ids[start : start + self._block_size]))
        return hashes[index]

    def _save(self, block: int) -> None:
        for gone in self.host.save(self._hash_of[block], block):
            if gone not in self._block_of:
                self.journal.lost(gone)

    def _evicted(self, block: int) -> None:
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        if digest not in self.host:
            self.journal.lost(digest)

    def _held(self) -> Iterable[bytes]:
        return self.host.digests | self._block_of.keys() if len(self.host) else self._block_of.keys()

    def check(self) -> None:
        """Raises AssertionError unless hashes and blocks are one to one and the pool keeps exactly those blocks."""
        self.host.check()
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hashes and blocks are not one to one"
        assert self._pool.kept == self._hash_of.keys(), (
            f"registered {sorted(self._hash_of)}, kept by the pool {sorted(self._pool.kept)}"
        )
