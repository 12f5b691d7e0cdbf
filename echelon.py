"""The public face of Echelon."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.client import Handle

__version__ = "0.1.0"


def connect(address: str | None = None, *, api_key: str | None = None) -> Handle:
    """A handle on a running cluster, through Ray: `ray.get(connect().generate.remote("3 + 4 ="))`.

    See `cluster.client.connect`.
    """
    from cluster.client import connect as join

    return join(address, api_key=api_key)
