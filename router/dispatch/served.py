"""What the replicas of a fleet executed for each account, as they report it; and what each is told of the others.

Reports are totals since a replica's start, so nothing is lost with a connection or with the dispatcher: one that was
restarted gets all of it again. Virtual times add up: each replica stands at the cluster's time divided by the replicas
plus its own service since, so the sum over them is the cluster's time, lifts included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from router.qos.fair_queue import FairQueue
from workers.api.ordering import Charge, Served, Service, ServiceReport, ServiceSync

_MOST_GONE = 1000  # replicas that went and may come back as themselves

Key = tuple[str, str]


@dataclass(slots=True)
class _Replica:
    """What was heard of one replica, and what it was told."""

    executed: int = 0
    overhead: int = 0
    accounts: dict[Key, Service] = field(default_factory=dict)
    here: bool = True
    synced: bool = False  # it was told all

    def units(self, key: Key) -> float:
        """That it executed for an account."""
        row = self.accounts.get(key)
        return 0.0 if row is None else row.units


class ServedLedger:
    """Of one fleet. Its waiting room is handed in, since a reload may change it."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._times: dict[Key, float] = {}  # that were told last

    def report(self, replica_id: str, report: ServiceReport, room: FairQueue[Any]) -> bool:
        """`room` has charged what is new in `report`. False: it is not known yet what was before."""
        replica = self._replicas.get(replica_id)
        fresh = replica is None
        if replica is None:
            if not report.whole:
                return False
            replica = self._replicas[replica_id] = _Replica()
        replica.here = True
        charges: list[Charge] = []
        for row in report.accounts:
            key = (row.key[0], row.key[1])
            before = replica.accounts.get(key)
            replica.accounts[key] = row
            standing = room.policy.find(key) or room.policy.standing(room.policy.config.account(key[1], key[0]))
            if before is None:
                charge = Charge(standing, row.prefill, row.decode, row.kv_read)
            else:
                charge = Charge(
                    standing, row.prefill - before.prefill, row.decode - before.decode, row.kv_read - before.kv_read
                )
            charges.append(charge)
            if fresh:  # it comes to stand where it stood there, whatever is charged now
                units = room.policy.prices.units(charge.prefill, charge.decode, charge.kv_read)
                standing.offset += row.time - units / standing.weight
        room.served(report.executed - replica.executed, report.overhead - replica.overhead, charges)
        replica.executed, replica.overhead = report.executed, report.overhead
        return True

    def note(self, replica_id: str, report: ServiceReport) -> None:
        """What is in `report` is nobody's, since there are no accounts now; what comes later counts from here."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            if not report.whole:
                return
            replica = self._replicas[replica_id] = _Replica()
        replica.here = True
        replica.accounts.update({(row.key[0], row.key[1]): row for row in report.accounts})
        replica.executed, replica.overhead = report.executed, report.overhead

    def gone(self, replica_id: str) -> None:
        """It is not there any more; what it executed was charged, and is not charged again if it comes back."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        replica.here = replica.synced = False
        if len(self._replicas) > _MOST_GONE:
            self._replicas = {i: r for i, r in self._replicas.items() if r.here}

    def syncs(self, room: FairQueue[Any]) -> list[tuple[str, ServiceSync]]:
        """For each replica what is new to it, by id."""
        here = {i: r for i, r in self._replicas.items() if r.here}
        count = len(here)
        times = {s.key: (s.service / s.weight + s.offset) / count for s in room.policy.standings} if here else {}
        news = [key for key, time in times.items() if self._times.get(key) != time]
        self._times = times
        found = []
        for replica_id, replica in here.items():
            keys = news if replica.synced else list(times)
            replica.synced = True
            if keys:
                rows = tuple(Served(key, times[key], replica.units(key)) for key in keys)
                found.append((replica_id, ServiceSync(rows)))
        return found
