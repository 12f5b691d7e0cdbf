"""What tests wait for and look at from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0  # seconds until what has not happened never will
_LOOKS = 0.05  # seconds between two looks


def await_true(condition: Callable[[], Any], failure: str | Callable[[], str], seconds: float = PATIENCE) -> None:
    """Return once `condition` holds; fail with `failure` when it does not for `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure() if callable(failure) else failure
        time.sleep(_LOOKS)


def listening(port: int) -> set[str]:
    """Addresses, as the kernel writes them, where somebody listens on `port`."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as f:
            for line in list(f)[1:]:
                address, at = line.split()[1].split(":")
                if int(at, 16) == port and line.split()[3] == "0A":
                    found.add(address)
    return found
