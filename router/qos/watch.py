"""Whether the guarantee holds now: how far service / quota of accounts that wait have drifted apart.

The books are its own: it hears which leases were granted and what they cost, and knows nothing of virtual times, so
that a defect of the policy shows. Of two accounts of a band that wait throughout an interval, with d their distance in
service / quota (what leases will probably cost counted in), the policy grants to the lesser one only. So d grows
beyond 0 by one lease at most, and by what the leases under way cost beyond what was expected; an interval sees at most
twice that. Grants out of turn (maximum waits, leases taken over at a restart) are allowed for in full.

Where engines order their steps, a lease is no service yet: each engine holds a waiting head of every account, and the
policy there says which of the leases under way are executed. Then d may hold what is under way, all of it at most, on
top of what the engines may let their accounts drift apart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import nlargest

from router.qos.config import Account

SPANS = (10.0, 60.0, 600.0)  # seconds of an interval; the long ones see a slow drift
SHARE_SPAN = 60.0
_ENOUGH = 10.0  # of the largest leases, served in an interval, until shares say something

log = logging.getLogger("echelon.qos")

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one tier. `gap` and `bound` are units of service over quota, those of the pair that is nearest to its bound.

    `share_error`: the most by which a share of service differed from its quota's over the last minute (1 = all of it).
    `violations`: intervals in which a gap was beyond its bound, since the start.
    """

    gap: float = 0.0
    bound: float = 0.0
    share_error: float = 0.0
    violations: int = 0


@dataclass(slots=True)
class _Book:
    """One account. Units; the figures of leases are the greatest of this and the last longest interval."""

    account: Account
    served: float = 0.0  # what ended leases cost, and what the others will probably
    out_of_turn: float = 0.0
    leases: int = 0
    lease: float = 0.0
    off: float = 0.0  # by how much a lease cost more or less than was expected
    peak: int = 0
    before: tuple[float, float, int] = (0.0, 0.0, 0)

    @property
    def weight(self) -> float:
        return self.account.quota or 1.0

    def rotate(self) -> None:
        self.before = (self.lease, self.off, self.peak)
        self.lease, self.off, self.peak = 0.0, 0.0, self.leases

    def slack(self, out_of_turn: float, steps: float) -> float:
        """How far it can be ahead, or be thrown back, in units / quota; `steps`: what ordered steps allow for."""
        lease, off, peak = (
            max(self.lease, self.before[0]),
            max(self.off, self.before[1]),
            max(self.peak, self.before[2]),
        )
        under_way = (off + (lease if steps else 0.0)) * peak
        return (lease + under_way + out_of_turn + steps) / self.weight


@dataclass(slots=True)
class _Interval:
    """Accounts that have waited since `since`, each with what it had been served then, in and out of turn."""

    span: float
    since: float = float("-inf")
    bases: dict[Key, tuple[float, float]] = field(default_factory=dict)
    accused: set[str] = field(default_factory=set)  # tiers: one violation an interval
    worst: dict[str, tuple[float, float]] = field(default_factory=dict)  # by tier: gap and bound, when last looked at


class Watch:
    """Told of every lease; `look` now and then."""

    def __init__(self) -> None:
        self._books: dict[Key, _Book] = {}
        self._intervals = [_Interval(span) for span in SPANS]
        self._violations: dict[str, int] = {}
        self._share_errors: dict[str, float] = {}
        self._looks = 0
        self._steps = 0.0

    def granted(self, account: Account, units: float, *, in_turn: bool = True) -> None:
        """A lease of `account`, which will probably cost `units`; a head that waits in an engine is in turn there."""
        book = self._book(account)
        book.served += units
        book.leases += 1
        book.peak = max(book.peak, book.leases)
        book.lease = max(book.lease, units)
        if not in_turn:
            book.out_of_turn += units

    def ended(self, account: Account, expected: float, units: float) -> None:
        """It has cost `units`."""
        book = self._book(account)
        book.served += units - expected
        book.leases -= 1
        book.off = max(book.off, abs(units - expected))

    def emptied(self, account: Account) -> None:
        """Nothing of `account` waits any more."""
        for interval in self._intervals:
            interval.bases.pop(account.key, None)

    def restart(self, leased: Iterable[tuple[Account, float]]) -> None:
        """Other quotas hold: what is compared begins anew. `leased`: who holds leases, and what each probably costs."""
        for interval in self._intervals:
            interval.since, interval.bases = float("-inf"), {}
        self._books.clear()
        for account, units in leased:
            self.granted(account, units, in_turn=False)

    def look(self, now: float, waiting: Iterable[Account], steps: float = 0.0) -> dict[str, Reading]:
        """The readings by tier; `waiting` are the accounts that wait at `now`.

        `steps`: units by which service of accounts may drift apart in the engines, U + max(X, E) + L of all of them
        together; 0 where they do not order their steps. When it changes, what is compared begins anew.
        """
        accounts = list(waiting)
        if steps != self._steps:
            self._steps = steps
            for interval in self._intervals:
                interval.since, interval.bases = float("-inf"), {}
        self._looks += 1
        for number, interval in enumerate(self._intervals):
            over = now - interval.since >= interval.span
            if over or self._looks % len(self._intervals) == number:  # each in turn: many accounts take a while
                self._compare(interval, now)
            if over:
                self._begin(interval, now, accounts)
        worst: dict[str, tuple[float, float]] = {}
        for interval in self._intervals:
            for tier, (gap, bound) in interval.worst.items():
                if tier not in worst or gap - bound > worst[tier][0] - worst[tier][1]:
                    worst[tier] = (gap, bound)
        tiers = {*worst, *self._violations, *self._share_errors, *(a.tier.name for a in accounts)}
        return {
            t: Reading(*worst.get(t, (0.0, 0.0)), self._share_errors.get(t, 0.0), self._violations.get(t, 0))
            for t in tiers
        }

    # inside

    def _compare(self, interval: _Interval, now: float) -> None:
        interval.worst = {}
        for band in self._bands(interval):
            tier = band[0].account.tier.name
            gap, bound = self._gap(band, interval)
            if gap > bound and tier not in interval.accused:
                interval.accused.add(tier)
                self._violations[tier] = self._violations.get(tier, 0) + 1
                log.error(
                    "tier %s: service / quota of two accounts that waited for %.0f s drifted %.0f apart, at most "
                    "%.0f is right", tier, now - interval.since, gap, bound,
                )  # fmt: skip
            if tier not in interval.worst or gap - bound > interval.worst[tier][0] - interval.worst[tier][1]:
                interval.worst[tier] = (gap, bound)
            if interval.span == SHARE_SPAN:
                self._measure_shares(band, interval)

    def _book(self, account: Account) -> _Book:
        book = self._books.get(account.key)
        if book is None:
            book = self._books[account.key] = _Book(account)
        book.account = account
        return book

    def _begin(self, interval: _Interval, now: float, accounts: list[Account]) -> None:
        interval.since, interval.accused = now, set()
        books = {a.key: self._book(a) for a in accounts}
        interval.bases = {key: (book.served, book.out_of_turn) for key, book in books.items()}
        if interval is self._intervals[-1]:
            self._books = {k: b for k, b in self._books.items() if b.leases or k in books}
            for book in self._books.values():
                book.rotate()

    def _bands(self, interval: _Interval) -> list[list[_Book]]:
        """Those of the interval that are measured on each other, two at least."""
        bands: dict[tuple[str, bool], list[_Book]] = {}
        for key in interval.bases:
            book = self._books[key]
            bands.setdefault((book.account.tier.name, book.account.quota > 0.0), []).append(book)
        return [band for band in bands.values() if len(band) > 1]

    def _gap(self, band: list[_Book], interval: _Interval) -> tuple[float, float]:
        """The gap of the two that are furthest beyond their bound, or nearest to it, and that bound."""
        rows = []
        for book in band:
            served, out_of_turn = interval.bases[book.account.key]
            slack = 2.0 * book.slack(book.out_of_turn - out_of_turn, self._steps)
            rows.append(((book.served - served) / book.weight, slack))
        numbers = range(len(rows))
        ahead = nlargest(2, numbers, key=lambda n: rows[n][0] - rows[n][1])
        behind = nlargest(2, numbers, key=lambda n: -rows[n][0] - rows[n][1])
        pairs = [
            (rows[first][0] - rows[last][0], rows[first][1] + rows[last][1])
            for first in ahead
            for last in behind
            if first != last
        ]
        return max(pairs, key=lambda pair: pair[0] - pair[1])

    def _measure_shares(self, band: list[_Book], interval: _Interval) -> None:
        if not band[0].account.quota:
            return
        served = [max(book.served - interval.bases[book.account.key][0], 0.0) for book in band]
        total, quotas = sum(served), sum(book.weight for book in band)
        if total < _ENOUGH * sum(max(book.lease, book.before[0]) for book in band) or not total:
            return
        errors = (abs(s / total - book.weight / quotas) for s, book in zip(served, band, strict=True))
        self._share_errors[band[0].account.tier.name] = max(errors)
