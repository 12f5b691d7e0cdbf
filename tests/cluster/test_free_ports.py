"""Ports for servers of our own are free, differ, and are none that the system hands out."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster import environment
from cluster.environment import FREE_PORTS, free_port, free_ports


def test_they_are_free_and_no_connection_gets_them() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(lowest <= port <= highest for port in ports)
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_one_that_is_taken_is_not_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(port for port in FREE_PORTS if port + 1 in FREE_PORTS and both_free(port))
    monkeypatch.setattr(environment, "FREE_PORTS", range(first, first + 2))
    with socket.create_server(("127.0.0.1", first)):
        assert free_port() == first + 1
        with pytest.raises(OSError, match="has no 2 free ports"):
            free_ports(2)


def both_free(port: int) -> bool:
    try:
        for number in (port, port + 1):
            socket.create_server(("127.0.0.1", number)).close()
    except OSError:
        return False
    return True
