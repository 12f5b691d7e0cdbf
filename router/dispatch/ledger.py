"""The books of the dispatcher: every request that came in ends exactly once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ledger:
    """Counts since the start, in requests. `late` messages named a lease that had ended; they change nothing."""

    acquired: int
    settled: int
    cancelled: int
    lost: int
    refused: int
    held: int
    waiting: int
    late: int
    mismatches: tuple[str, ...]  # replicas and leases whose counts differ from what is held

    @property
    def balanced(self) -> bool:
        """Whether each request is accounted for once, and in-flight counts are those of the leases."""
        ended = self.settled + self.cancelled + self.lost + self.refused
        return self.acquired == ended + self.held + self.waiting and not self.mismatches


@dataclass(slots=True)
class Ends:
    """What the dispatcher counts as it goes."""

    acquired: int = 0
    settled: int = 0
    cancelled: int = 0
    lost: int = 0
    refused: int = 0
    late: int = 0

    def ledger(self, *, held: int, waiting: int, mismatches: tuple[str, ...]) -> Ledger:
        """The books with what stands now."""
        return Ledger(
            self.acquired, self.settled, self.cancelled, self.lost, self.refused, held, waiting, self.late, mismatches
        )
