"""All leases that stand, by id and by replica, and the books of how each request ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from router.dispatch.ledger import Ends, Ledger
from router.dispatch.table import Lease, Replica
from router.qos.queue import counted


class Leases:
    """A lease may name a replica that is not registered (yet): its ingress came back before the replica did."""

    def __init__(self) -> None:
        self.by_id: dict[str, Lease] = {}
        self.ends = Ends()
        self.by_owner: dict[str, dict[tuple[str, str], int]] = {}  # how many, by model and the tier that the key says
        self._on: dict[str, dict[str, Lease]] = {}  # by replica, registered or not yet

    def __len__(self) -> int:
        return len(self.by_id)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self.by_id

    def get(self, lease_id: str) -> Lease | None:
        """The lease, if it stands."""
        return self.by_id.get(lease_id)

    def on(self, replica_id: str) -> dict[str, Lease]:
        """Those on `replica_id`, for its row of the table to share; it is kept up to date from here."""
        return self._on.setdefault(replica_id, {})

    def held_on(self, replica_id: str) -> Iterable[Lease]:
        """Those on `replica_id`, which need not be registered."""
        return self._on.get(replica_id, {}).values()

    def of(self, client: str) -> list[str]:
        """Ids of those that `client` holds."""
        return [lease_id for lease_id, lease in self.by_id.items() if lease.client == client]

    def hold(self, lease: Lease, replica: Replica | None, prefill: int, now: float) -> None:
        """`lease` stands; its slots and blocks are held on `replica`, where `prefill` tokens are to be computed."""
        lease_id = lease.request.lease_id
        self.by_id[lease_id] = lease
        self._count(lease, 1)
        if replica is None:
            self.on(lease.replica_id)[lease_id] = lease
        else:
            replica.add(lease_id, lease, prefill, now)

    def drop(self, lease_id: str, replica: Replica | None, now: float) -> None:
        """The lease, which is on `replica` if that is registered, stands no more."""
        lease = self.by_id.pop(lease_id)
        self._count(lease, -1)
        if replica is not None:
            replica.remove(lease_id, now)
            return
        rest = self._on[lease.replica_id]
        del rest[lease_id]
        if not rest:
            del self._on[lease.replica_id]

    def drop_all_on(self, replica_id: str) -> list[Lease]:
        """Those that were on `replica_id`, which is no more."""
        gone = self._on.pop(replica_id, {})
        for lease_id, lease in gone.items():
            del self.by_id[lease_id]
            self._count(lease, -1)
        return list(gone.values())

    def ledger(self, replicas: Iterable[Replica], waiting: int) -> Ledger:
        """The books, counted anew, with `waiting` requests without a lease."""
        wrong = []
        for replica in replicas:
            if sum(lease.request.choices for lease in replica.leases.values()) != replica.slots:
                wrong.append(replica.info.id)
        on = {lease_id for leases in self._on.values() for lease_id in leases}
        wrong += sorted(on ^ set(self.by_id))
        owners = Counter((r.owner, r.model, r.tier) for r in (lease.request for lease in self.by_id.values()))
        if owners != {(owner, *key): n for owner, counts in self.by_owner.items() for key, n in counts.items()}:
            wrong.append("by owner")
        return self.ends.ledger(held=len(self.by_id), waiting=waiting, mismatches=tuple(wrong))

    def _count(self, lease: Lease, change: int) -> None:
        request = lease.request
        counts = self.by_owner.setdefault(request.owner, {})
        counted(counts, (request.model, request.tier), change)
        if not counts:
            del self.by_owner[request.owner]
