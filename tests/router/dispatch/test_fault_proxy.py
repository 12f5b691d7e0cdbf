"""The faults of LMDeploy's proxy (v0.2.6 to v0.4.2) as tests, as far as they are of the choice among nodes.

The others, a probe without a timeout and one miss that removes a node, and failures streamed as HTTP 200, are in
`tests/router/front/test_nodes.py`.

Mutants seen to fail: `>` for `<` in the choice; the new request not counted; requests counted instead of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from router.dispatch.client import refusal_error
from router.dispatch.dispatcher import Dispatcher, DispatcherConfig
from router.dispatch.lease import Refused
from router.dispatch.strategies import STRATEGIES
from router.dispatch.table import Demand, Replica
from router.protocol.errors import answer_for

from .virtual import ask, done, info, made, replica_of


def nodes(speeds: dict[str, float], strategy: str = "min_expected_latency") -> Dispatcher:
    d, _ = made(DispatcherConfig(strategy=strategy, recovery=0.0))
    for name, speed in speeds.items():
        d.replica_up(info(name, slots=200, blocks=100_000, context=200_000), speed=speed)
    return d


class RequestsBySpeed:
    """What the proxy meant: the least (requests there) / speed."""

    def choose(self, candidates: Sequence[Replica], demand: Demand) -> Replica:
        return min(candidates, key=lambda r: r.slots * r.token_seconds)


def test_fault_proxy_it_is_not_always_the_first_node() -> None:
    d = nodes({"a": 100.0, "b": 100.0, "c": 100.0})
    taken = Counter(replica_of(d.acquire("i", ask())) for _ in range(30))
    assert set(taken.values()) == {10}


def test_fault_proxy_idle_nodes_of_speed_1_and_100_are_not_split_evenly() -> None:
    """One request at a time, and each finds both idle: a rule that does not count the new one sees two equals."""
    d, theirs = nodes({"slow": 1.0, "fast": 100.0}), nodes({"slow": 1.0, "fast": 100.0})
    theirs._granting._strategy = RequestsBySpeed()
    for number in range(20):
        assert replica_of(d.acquire("i", ask(f"{number}"))) == "fast"
        d.settle(done(f"{number}"))
    assert replica_of(theirs.acquire("i", ask())) == "slow"  # so it was


def test_fault_proxy_a_long_prompt_is_not_one_request_like_any_other() -> None:
    d = nodes({"a": 1000.0, "b": 1000.0})
    long = replica_of(d.acquire("i", ask(prompt=100_000)))
    short = [replica_of(d.acquire("i", ask(prompt=1))) for _ in range(20)]
    assert set(short) == {"a", "b"} - {long}


def test_fault_proxy_min_observed_latency_tries_a_new_node() -> None:
    d = nodes({"old": 100.0}, "min_observed_latency")
    for number in range(3):
        assert replica_of(d.acquire("i", ask(f"{number}"))) == "old"
        d.settle(done(f"{number}"))
    d.replica_up(info("new", slots=200), speed=1.0)
    assert replica_of(d.acquire("i", ask())) == "new"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_fault_proxy_no_node_is_a_503_that_says_so(strategy: str) -> None:
    d, clock = made(DispatcherConfig(strategy=strategy, models=("m",), recovery=0.0))
    assert d.acquire("i", ask()) is None
    clock.now += d.config.replica_grace
    (reply,) = d.tick()
    assert isinstance(reply.message, Refused)
    answer = answer_for(refusal_error(reply.message))
    assert (answer.status, answer.code) == (503, "no_replica")
    assert "no replica of m" in answer.message
    assert answer.headers["retry-after"] == "5"
