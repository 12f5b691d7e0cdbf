"""Claims of idempotency keys and the answers kept for them: the plain object, and over sockets."""

from __future__ import annotations

import asyncio
import math

import pytest

from router.dispatch import answers as kept_answers
from router.dispatch.answers import KEEP_SECONDS, MAX_ANSWER_BYTES, KeptAnswers
from router.dispatch.client import DispatcherClient
from router.dispatch.dispatcher import DispatcherConfig
from router.dispatch.lease import Claim, Claimed, Keep, Verdict
from router.protocol.errors import HttpRefusal
from router.remote_answers import RemoteAnswers
from workers.api.errors import NoReplica, Overloaded

from .fakes import SECRET, Cluster, until
from .virtual import Clock

K, B, A = b"key", b"body", b"answer"


def made(grace: float = 5.0) -> tuple[KeptAnswers, Clock]:
    clock = Clock()
    return KeptAnswers(clock, grace), clock


def claim(answers: KeptAnswers, client: str, number: int, body: bytes = B, *, wait: bool = True) -> Verdict | None:
    """The verdict that comes at once."""
    told = answers.claim(client, Claim(number, K, body, wait))
    return told[0][1].verdict if told else None


def test_the_first_runs_the_others_wait_and_a_retry_gets_the_same() -> None:
    answers, clock = made()
    assert claim(answers, "i", 1) is Verdict.FIRST
    assert claim(answers, "i", 2) is None
    assert claim(answers, "j", 3) is None
    assert claim(answers, "j", 4, b"other") is Verdict.OTHER_BODY
    assert claim(answers, "j", 5, wait=False) is Verdict.RUNNING
    told = answers.keep("i", Keep(K, B, A))
    assert told == [("i", Claimed(2, K, Verdict.KEPT, A)), ("j", Claimed(3, K, Verdict.KEPT, A))]
    clock.now += KEEP_SECONDS - 0.1
    assert answers.claim("j", Claim(6, K, B, True)) == [("j", Claimed(6, K, Verdict.KEPT, A))]
    assert claim(answers, "j", 7, b"other") is Verdict.OTHER_BODY
    clock.now += 0.2
    assert claim(answers, "j", 8) is Verdict.FIRST
    answers.tick()
    assert (len(answers), answers.bytes) == (0, 0)


@pytest.mark.parametrize("answer", [b"", b"x" * (MAX_ANSWER_BYTES + 1)])
def test_without_an_answer_the_next_one_is_first(answer: bytes) -> None:
    answers, _ = made()
    claim(answers, "i", 1)
    claim(answers, "j", 2)
    claim(answers, "k", 3)
    assert answers.keep("i", Keep(K, B, answer)) == [("j", Claimed(2, K, Verdict.FIRST))]
    assert answers.keep("j", Keep(K, B, b"")) == [("k", Claimed(3, K, Verdict.FIRST))]
    assert answers.keep("k", Keep(K, B, b"")) == []
    assert claim(answers, "i", 4) is Verdict.FIRST


def test_a_front_that_goes_away_gives_up_its_claims_after_a_while() -> None:
    answers, clock = made(grace=5.0)
    claim(answers, "i", 1)
    claim(answers, "j", 2)
    claim(answers, "k", 3)
    answers.client_gone("j")
    answers.client_gone("i")
    clock.now += 4.9
    assert answers.tick() == []
    clock.now += 0.2
    assert answers.tick() == [("k", Claimed(3, K, Verdict.FIRST))]
    assert answers.keep("i", Keep(K, B, b"late")) == []  # it is k's now
    assert answers.keep("k", Keep(K, B, A)) == []
    assert claim(answers, "j", 4) is Verdict.KEPT


def test_a_front_that_comes_back_goes_on() -> None:
    answers, clock = made(grace=5.0)
    claim(answers, "i", 1)
    claim(answers, "j", 2)
    answers.client_gone("i")
    assert claim(answers, "i", 0, wait=False) is None
    clock.now += 10.0
    assert answers.tick() == []
    assert answers.keep("i", Keep(K, B, A)) == [("j", Claimed(2, K, Verdict.KEPT, A))]


def test_a_new_dispatcher_is_told_what_runs_and_what_has_ended() -> None:
    answers, _ = made()
    assert claim(answers, "i", 0, wait=False) is None
    assert claim(answers, "j", 1) is None
    other, _ = made()
    assert other.keep("i", Keep(K, B, A)) == []
    assert claim(other, "j", 1) is Verdict.KEPT


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_KEPT", 3)
    monkeypatch.setattr(kept_answers, "MAX_KEPT_BYTES", 25)
    monkeypatch.setattr(kept_answers, "MAX_CLAIMS", 2)
    answers, _ = made()
    for i in range(5):
        answers.keep("i", Keep(b"k%d" % i, B, b"x" * 5))
    assert (len(answers), answers.bytes) == (3, 15)
    answers.keep("i", Keep(b"big", B, b"x" * 20))
    assert (len(answers), answers.bytes) == (2, 25)
    answers.keep("i", Keep(b"big", B, b"x" * 10))
    assert (len(answers), answers.bytes) == (2, 15)
    verdicts = [answers.claim("i", Claim(1, b"n%d" % i, B, True))[0][1].verdict for i in range(3)]
    assert verdicts == [Verdict.FIRST, Verdict.FIRST, Verdict.FULL]


QUICK = DispatcherConfig(canary_every=math.inf, orphan_grace=0.05)


def front(cluster: Cluster, name: str) -> tuple[DispatcherClient, RemoteAnswers]:
    client = DispatcherClient(name, secret=SECRET, locate=cluster._locate)
    client.start()
    return client, RemoteAnswers(client, patience=0.2)


async def test_a_retry_at_another_front_waits_for_the_first() -> None:
    async with Cluster() as cluster:
        mine = RemoteAnswers(cluster.client)
        other, theirs = front(cluster, "ingress-2")
        assert await mine.claim(K, B, wait=True) is None
        with pytest.raises(HttpRefusal) as caught:
            await mine.claim(K, b"other", wait=True)
        assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")
        await until(lambda: other.connected)
        with pytest.raises(HttpRefusal) as caught:
            await theirs.claim(K, B, wait=False)
        assert (caught.value.status, caught.value.code) == (409, "idempotency_key_in_use")
        retry = asyncio.create_task(theirs.claim(K, B, wait=True))
        await asyncio.sleep(0.01)
        assert not retry.done()
        mine.keep(K, B, A)
        assert await retry == A
        await other.close()


async def test_the_death_of_the_first_front_makes_the_retry_first() -> None:
    async with Cluster(config=QUICK) as cluster:
        mine = RemoteAnswers(cluster.client)
        dying, theirs = front(cluster, "ingress-2")
        await until(lambda: dying.connected)
        assert await theirs.claim(K, B, wait=True) is None
        retry = asyncio.create_task(mine.claim(K, B, wait=True))
        await asyncio.sleep(0.01)
        await dying.close()
        assert await retry is None


async def test_a_waiter_that_leaves_is_passed_over() -> None:
    async with Cluster() as cluster:
        mine = RemoteAnswers(cluster.client)
        assert await mine.claim(K, B, wait=True) is None
        leaver = asyncio.create_task(mine.claim(K, B, wait=True))
        await asyncio.sleep(0.01)
        stayer = asyncio.create_task(mine.claim(K, B, wait=True))
        await asyncio.sleep(0.01)
        leaver.cancel()
        mine.keep(K, B, b"")
        assert await stayer is None
        assert leaver.cancelled()


async def test_a_claim_outlives_the_dispatcher() -> None:
    async with Cluster(config=QUICK) as cluster:
        mine = RemoteAnswers(cluster.client)
        assert await mine.claim(K, B, wait=True) is None
        assert await mine.claim(b"ends", B, wait=True) is None
        await cluster.stop_dispatcher()
        mine.keep(b"ends", B, A)
        await cluster.start_dispatcher()
        await until(lambda: cluster.client.connected)
        assert await mine.claim(b"ends", B, wait=True) == A
        retry = asyncio.create_task(mine.claim(K, B, wait=True))
        await asyncio.sleep(0.15)  # longer than the grace
        mine.keep(K, B, A)
        assert await retry == A


async def test_without_a_dispatcher_nobody_is_first() -> None:
    async with Cluster() as cluster:
        mine = RemoteAnswers(cluster.client, patience=0.05)
        await cluster.stop_dispatcher()
        with pytest.raises(NoReplica):
            await mine.claim(K, B, wait=True)


async def test_too_many_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_CLAIMS", 0)
    async with Cluster() as cluster:
        with pytest.raises(Overloaded):
            await RemoteAnswers(cluster.client).claim(K, B, wait=True)
