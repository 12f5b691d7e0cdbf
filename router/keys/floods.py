"""Who sends many wrong keys: a bounded table of client addresses."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable


class FloodGuard:
    """Lets `burst` wrong keys of one address pass at once, and `rate` a second in the long run.

    It only words the answer to wrong keys: 256 random bits need no protection against guessing, and a good key from
    the same address is never asked to wait. Of more than `addresses` the longest unseen is forgotten.
    `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        *,
        burst: int = 20,
        rate: float = 1.0,
        addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gap, self._slack, self._addresses, self._clock = 1 / rate, burst / rate, addresses, clock
        self._paid_until: OrderedDict[str, float] = OrderedDict()  # each wrong key costs `gap` seconds of good conduct

    def __len__(self) -> int:
        return len(self._paid_until)

    def wrong(self, client: str | None) -> float:
        """Count a wrong key of `client`; the seconds that it should wait, 0.0 while it sends few."""
        now, home = self._clock(), _home(client)
        due = max(now, self._paid_until.get(home, now)) + self._gap
        wait = due - now - self._slack
        if wait > 0:
            return wait
        self._paid_until[home] = due
        self._paid_until.move_to_end(home)
        if len(self._paid_until) > self._addresses:
            self._paid_until.popitem(last=False)
        return 0.0


def _home(client: str | None) -> str:
    """One host's address: of IPv6 the network, since a host has all of its addresses."""
    try:
        address = ipaddress.ip_address((client or "").split("%")[0])
    except ValueError:
        return (client or "")[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
