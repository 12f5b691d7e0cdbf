"""When a silent peer is taken for dead: looks at a channel under a clock of our own."""

from __future__ import annotations

from typing import Any

import pytest

from workers.api.channel import DIALLED_SILENCE_SECONDS, HEARTBEAT_SECONDS, LOOKS, SILENCE_SECONDS, Channel
from workers.api.wire import ENGINE_CODEC, WIRE_VERSION, Hello, Ping

HELLO = Hello(WIRE_VERSION, "secret", "me")
STEP = HEARTBEAT_SECONDS / LOOKS
PING = ENGINE_CODEC.encode(Ping())


class Wire:
    """A transport that only remembers."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return "127.0.0.1", 1


class Deaf:
    def opened(self, channel: Channel) -> None: ...

    def received(self, channel: Channel, message: Any) -> None: ...

    def closed(self, channel: Channel, reason: str) -> None: ...


class Clocked:
    """A channel whose looks happen when `run` says so."""

    def __init__(self, *, dialled: bool) -> None:
        self.now = 100.0
        self.wire = Wire()
        self.channel = Channel(ENGINE_CODEC, Deaf(), "secret", HELLO if dialled else None)
        self.channel._now = lambda: self.now  # type: ignore[method-assign]
        self.channel.connection_made(self.wire)  # type: ignore[arg-type]
        if not dialled:
            self.channel.data_received(ENGINE_CODEC.encode(HELLO))

    def look(self, after: float = STEP) -> None:
        """The next look comes `after` seconds; until the channel is given up."""
        self.now += after
        self.channel._looking.cancel()  # type: ignore[union-attr]
        self.channel._look()

    def until_given_up(self) -> float:
        began = self.now
        while not self.wire.aborted:
            self.look()
        self.channel.connection_lost(None)
        return self.now - began


@pytest.mark.parametrize(("dialled", "limit"), [(True, DIALLED_SILENCE_SECONDS), (False, SILENCE_SECONDS)])
async def test_silence_is_found_within_one_look(dialled: bool, limit: float) -> None:
    assert limit < Clocked(dialled=dialled).until_given_up() <= limit + STEP


async def test_a_stopped_rank_is_given_up_with_time_left_for_its_streams_to_go_on() -> None:
    assert Clocked(dialled=True).until_given_up() < 2.5


async def test_whoever_speaks_lives_on_and_is_spoken_to() -> None:
    clocked = Clocked(dialled=True)
    for _ in range(40):
        clocked.look()
        clocked.channel.data_received(PING)
    assert not clocked.wire.aborted
    assert clocked.wire.sent.count(PING) == 20  # every other look: once a heartbeat
    clocked.until_given_up()


async def test_time_in_which_we_did_not_run_is_not_held_against_the_peer() -> None:
    """After a stall of our own, uvloop runs timers before it reads what came meanwhile."""
    clocked = Clocked(dialled=True)
    clocked.look()
    clocked.look(after=30.0)
    assert not clocked.wire.aborted
    left = clocked.until_given_up()
    assert DIALLED_SILENCE_SECONDS - 3 * STEP < left <= DIALLED_SILENCE_SECONDS
