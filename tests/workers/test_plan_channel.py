"""Plans arrive whole and in order, through the ring and over the socket, and EOF ends a receiver."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from workers.api.errors import WireError
from workers.api.request import SamplingParams
from workers.engine.plan import NewSequence, ScheduledSequence, StepMasks, StepPlan
from workers.parallel import channel
from workers.parallel.channel import PlanReceiver, PlanSender


def plan(step: int, size: int) -> StepPlan:
    new = NewSequence(1, tuple(range(size)), size, SamplingParams(4, seed=2**64 - 1), (3, 4))
    return StepPlan(step, (step % 7,), (new,), (ScheduledSequence(1, 0, size, 1, (5, 6)),))


@pytest.mark.parametrize("far", [False, True])
def test_plans_arrive_in_order(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "RING_BYTES", 4096)  # so that the ring wraps often
    sender = PlanSender("127.0.0.1", receivers=2)
    got: list[list[StepPlan]] = [[], []]
    taken = [threading.Semaphore(0), threading.Semaphore(0)]

    def receive(i: int) -> None:
        receiver = PlanReceiver(sender.address, sender.secret)
        while (p := receiver.receive()) is not None:
            got[i].append(p)
            taken[i].release()
        receiver.close()

    if far:
        hosts = iter(["here", "there", "here", "elsewhere"])
        monkeypatch.setattr(channel, "host_id", lambda: next(hosts, "here"))
    threads = [threading.Thread(target=receive, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    sender.accept()
    sent = [plan(i, 1 + 37 * i % 200) for i in range(300)]
    for p in sent:
        sender.send(p)
        for s in taken:  # as collectives do: nobody is a ring behind
            assert s.acquire(timeout=10)
    sender.close()
    for t in threads:
        t.join(timeout=10)
        assert not t.is_alive()
    assert got == [sent, sent]


def test_there_is_room_for_the_masks_of_a_full_step() -> None:
    """1,024 rows of 262,144 tokens are more than the ring of plans."""
    sender = PlanSender("127.0.0.1", receivers=1, masked_rows=1024)
    bits = bytes(range(256)) * (1024 * 128)
    found: list[bool] = []
    taken = threading.Semaphore(0)

    def receive() -> None:
        receiver = PlanReceiver(sender.address, sender.secret)
        while (got := receiver.receive()) is not None:
            found.append(got == (masks(len(found) // 2) if len(found) % 2 else plan(len(found) // 2, 9)))
            taken.release()
        receiver.close()

    def masks(step: int) -> StepMasks:
        return StepMasks(step, tuple(range(1024)), bits)

    thread = threading.Thread(target=receive)
    thread.start()
    sender.accept()
    for step in range(5):
        sender.send(plan(step, 9))  # taken at any time before the next step's masks
        sender.send(masks(step))
        assert taken.acquire(timeout=10)
        assert taken.acquire(timeout=10)
    sender.close()
    thread.join(timeout=10)
    assert found == [True] * 10


@pytest.mark.parametrize("far", [False, True])
def test_a_receiver_that_is_gone_is_named(far: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if far:
        hosts = iter(["here", "there"])
        monkeypatch.setattr(channel, "host_id", lambda: next(hosts))
    sender = PlanSender("127.0.0.1", receivers=1)
    thread = threading.Thread(target=lambda: PlanReceiver(sender.address, sender.secret, "rank 3").close())
    thread.start()
    sender.accept()
    thread.join(timeout=10)
    with pytest.raises(ConnectionError, match="rank 3 takes no plans any more"):  # noqa: PT012 - the kernel tells late
        for _ in range(1000):
            sender.send(plan(0, 1))
            time.sleep(0.001)
    sender.close()


@pytest.mark.parametrize("words", [None, b"", b"wrong\0boot\0rank 9\n", b"no greeting at all\n", b"\xff" * 5000])
def test_strangers_are_sent_away_and_the_gang_meets(words: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "GREETING_SECONDS", 0.2)  # what a silent one costs
    sender = PlanSender("127.0.0.1", receivers=1)
    stranger = socket.create_connection(sender.address)
    if words is not None:
        stranger.sendall(words)
    if words == b"":
        stranger.close()
    got: list[StepPlan | None] = []

    def follow() -> None:
        receiver = PlanReceiver(sender.address, sender.secret)
        got.append(receiver.receive())
        receiver.close()

    thread = threading.Thread(target=follow)
    thread.start()
    sender.accept()
    sender.send(plan(0, 1))
    thread.join(timeout=10)
    assert got == [plan(0, 1)]
    sender.close()
    stranger.close()


def test_a_wrong_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "ATTACH_SECONDS", 0.5)
    sender = PlanSender("127.0.0.1", receivers=1)

    def greet() -> None:
        with pytest.raises(WireError, match="refused"):
            PlanReceiver(sender.address, "wrong")

    thread = threading.Thread(target=greet)
    thread.start()
    with pytest.raises(TimeoutError):
        sender.accept()
    sender.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
