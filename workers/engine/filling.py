"""A step that is being filled turn by turn: what of each sequence runs in it so far."""

from __future__ import annotations

from workers.engine.plan import NewSequence, ScheduledSequence
from workers.engine.scheduler import Run
from workers.engine.sequence import Sequence


class Filling:
    """`left` query tokens may still be added. A sequence decodes once; its prompt may come in several parts."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.running: set[Sequence] = set()  # all that are in the plan
        self.decoding: list[Sequence] = []
        self.decodes: list[ScheduledSequence] = []  # theirs
        self.parts: list[Run] = []  # of prompts, in the order of their positions
        self.added: list[NewSequence] = []
        self.kv_tokens = 0  # read by the decodes

    def decode(self, sequences: list[Sequence], runs: list[ScheduledSequence]) -> None:
        """One more position of each."""
        self.running.update(sequences)
        self.decoding += sequences
        self.decodes += runs
        self.kv_tokens += sum([run.start for run in runs]) + len(runs)
        self.left -= len(runs)

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
