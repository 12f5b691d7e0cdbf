"""What a trial makes of what its clients saw, and a run of its trials."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chaos.clients import Seen, front_of
from chaos.fault import Fault, Scene
from chaos.faults_front import IngressKilled
from chaos.judge import Fate, Verdict
from chaos.oracle import FILE, MOST_TOKENS, Ask, Oracle, weights_digest
from chaos.report import Report, spread, summary
from chaos.trial import Trial, judge_trial

ASK = Ask("Count.", tokens=9, stream=True, choices=1, logprobs=False, expected="x", prompt_tokens=5)
AT = 100.0


class Cut(Fault):
    name: ClassVar[str] = "cut"
    forgives: ClassVar[frozenset[Fate]] = frozenset({Fate.TORN})

    async def inject(self, scene: Scene) -> None:
        raise NotImplementedError

    def noticed(self, site: Any) -> bool:
        raise NotImplementedError


class Strict(Cut):
    name: ClassVar[str] = "strict"
    forgives: ClassVar[frozenset[Fate]] = frozenset()


def seen(*arrivals: float, fate: Fate = Fate.EXACT, began: float = 95.0, name: str = "", front: str = "") -> Seen:
    first, *rest = arrivals or (None,)
    return Seen(ASK, began, first, rest, rest[-1] if rest else first, Verdict(fate), name, front)


def judged(fault: Fault, touched: list[Seen], later: list[Seen] = [], *, in_flight: int = 8) -> Trial:  # noqa: B006
    fault.at = AT
    trial = Trial(0, fault.name, in_flight=in_flight, detection=0.5)
    judge_trial(trial, fault, touched, [*touched, *later])
    return trial


def test_failover_is_the_longest_pause_that_ended_after_the_fault() -> None:
    calm = seen(90.0, 97.0, 99.0, 99.9, 100.2, 101.0)
    hit = seen(98.0, 99.0, 99.5, 102.0, 102.5)
    assert judged(Strict(), [calm, hit]).failover == pytest.approx(2.5)
    assert judged(Strict(), [calm]).failover == pytest.approx(0.8)


def test_a_request_that_came_after_the_fault_has_waited_for_its_acceptance() -> None:
    trial = judged(Strict(), [seen(98.0, 101.0)], [seen(103.0, 104.0, began=100.5), seen(101.0, 102.0, began=100.9)])
    assert trial.accepted_after == pytest.approx(2.5)


def test_what_is_declared_is_forgiven_and_nothing_else() -> None:
    torn = seen(98.0, 99.0, 100.1, fate=Fate.TORN)
    assert judged(Cut(), [torn]).passed
    trial = judged(Strict(), [torn, seen(98.0, 99.0, 101.0)])
    assert (trial.lost, len(trial.wrong), trial.fates) == (1, 1, {Fate.TORN: 1, Fate.EXACT: 1})
    repeated = judged(Cut(), [seen(98.0, 99.0, fate=Fate.REPEATED)])
    assert (repeated.lost, len(repeated.wrong)) == (0, 1)


def killed(of: int) -> IngressKilled:
    fault = IngressKilled()
    fault.pid, fault.count, fault.gone = 71, of, AT + 0.05
    return fault


MINE, OTHER, LIKE = "ingress-71-abc", "ingress-8-def", "ingress-711-ghi"
WELL = [seen(98.0, 99.0, 101.0, front=front) for front in (MINE, OTHER)]


def torn(front: str, fate: Fate = Fate.TORN) -> Seen:
    return seen(98.0, 99.0, 100.1, fate=fate, name="chaos-3", front=front)


def test_of_several_ingresses_the_killed_one_alone_may_tear_streams() -> None:
    trial = judged(killed(of=2), [*WELL, torn(MINE)])
    assert (trial.passed, trial.fronts) == (True, {MINE: 2, OTHER: 1})
    for front in (OTHER, LIKE, ""):
        trial = judged(killed(of=2), [*WELL, torn(front)])
        assert (trial.lost, len(trial.wrong)) == (1, 1)
        assert trial.wrong[0].startswith(f"torn: chaos-3 at {front}" if front else "torn: chaos-3:")
    assert judged(killed(of=2), [*WELL, torn(MINE, Fate.LESS)]).wrong, "a token of a stream that ended is missing"
    assert judged(killed(of=1), [torn("")]).passed
    assert judged(killed(of=1), [torn(OTHER)]).wrong, "the next ingress's"


def test_who_was_never_accepted_may_have_been_at_the_killed_ingress_if_he_came_before() -> None:
    cases = (99.9, "", True), (100.04, "", True), (100.1, "", False), (99.9, OTHER, False), (100.1, MINE, True)
    for began, front, passed in cases:
        unanswered = seen(fate=Fate.UNANSWERED, began=began, front=front)
        assert judged(killed(of=2), WELL, [unanswered]).passed is passed


def test_where_one_ingress_carries_all_the_death_of_one_proves_nothing() -> None:
    for front in (MINE, OTHER):
        assert judged(killed(of=2), [seen(98.0, 101.0, front=front)]).invalid
    assert not judged(killed(of=1), [seen(98.0, 101.0, front=MINE)]).invalid


def test_the_ingress_of_a_request_is_that_of_its_last_lease() -> None:
    body = json.dumps({"leases": [{"front": OTHER}, {"front": MINE}]}).encode()
    assert front_of(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body) == MINE
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert front_of(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) == MINE
    assert front_of(b'HTTP/1.1 200 OK\r\n\r\n{"leases": []}') == ""
    assert front_of(b"HTTP/1.1 404 Not Found\r\n\r\n{}") == ""


def test_too_little_load_proves_nothing() -> None:
    trial = judged(Strict(), [seen(98.0, 101.0)], in_flight=7)
    assert trial.invalid
    assert not trial.passed
    assert summary([trial])["strict"]["trials"] == 0
    assert Report("", 0, {}, [trial]).failed, "a run of invalid trials has not passed"


def test_a_loss_anywhere_fails_the_run_and_stands_in_the_file(tmp_path: Path) -> None:
    good, bad = judged(Strict(), [seen(98.0, 101.0)]), judged(Strict(), [seen(98.0, 101.0, fate=Fate.HUNG)])
    report = Report("", 0, {}, [good])
    assert not report.failed
    report.trials.append(bad)
    report.write(tmp_path / "chaos.json")
    stored = json.loads((tmp_path / "chaos.json").read_text())
    assert (stored["passed"], stored["lost"], stored["duplicated"]) == (False, 1, 0)
    assert stored["by_fault"]["strict"]["lost_below"] == 1.5
    assert Report("", 0, {}, [good], ledgers=["a lease is held"]).failed


def test_spread_leaves_out_what_is_not_known() -> None:
    assert spread([None]) is None
    assert spread([1.0, None, 3.0]) == {"p50": 2.0, "p99": 2.98, "min": 1.0, "max": 3.0, "n": 2}


def test_the_oracle_is_of_this_model_and_the_same_for_the_same_seed() -> None:
    oracle = Oracle()
    assert oracle.weights == weights_digest(), f"make {FILE.name} again: python -m chaos.oracle"
    one, two, other = (
        [oracle.ask(random.Random(seed), tokens=(50, MOST_TOKENS)) for _ in range(3)] for seed in (1, 1, 2)
    )
    assert one == two != other
    ask = oracle.ask(random.Random(0), tokens=(10, 10), choices=2)
    assert ask.usage == (ask.prompt_tokens, 20)
    longer = oracle.ask(random.Random(0), tokens=(60, 60), choices=2)
    assert longer.expected.startswith(ask.expected)
