"""A step that is being filled turn by turn: what of each sequence runs in it so far."""

from __future__ import annotations

from workers.engine.plan import NewSequence, ScheduledSequence
from workers.engine.scheduler import Run
from workers.engine.sequence import Sequence


class Filling:
    """`left` query tokens may still be added. A sequence decodes once; its prompt may come in several parts."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.decodes: list[Run] = []
        self.parts: list[Run] = []  # of prompts, in the order of their positions
        self.added: list[NewSequence] = []
        self.kv_tokens = 0  # read by the decodes
        self._decoding: set[Sequence] = set()
        self._known = 0  # parts that `_prefilling` knows
        self._prefilling: set[Sequence] = set()

    def __contains__(self, sequence: Sequence) -> bool:
        if self._known < len(self.parts):
            self._prefilling.update(s for s, _ in self.parts[self._known :])
            self._known = len(self.parts)
        return sequence in self._decoding or sequence in self._prefilling

    @property
    def empty(self) -> bool:
        """Whether nothing runs."""
        return not (self.decodes or self.parts)

    def decode(self, sequence: Sequence, run: ScheduledSequence) -> None:
        """One more position of it."""
        self.decodes.append((sequence, run))
        self._decoding.add(sequence)
        self.kv_tokens += run.start + 1
        self.left -= 1

    def chunks(self) -> list[Run]:
        """The parts of each prompt as one."""
        whole: dict[Sequence, ScheduledSequence] = {}
        for sequence, part in self.parts:
            first = whole.get(sequence)
            if first is not None:
                blocks = first.new_blocks + part.new_blocks
                part = ScheduledSequence(part.slot, first.start, first.count + part.count, part.emit, blocks)
            whole[sequence] = part
        return list(whole.items())
