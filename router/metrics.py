"""Prometheus metrics: vLLM's names where the meaning is the same, `echelon_*` for ours.

Requests feed counters and histograms as they happen (`Metrics.request` gives one `Meter` a request). The engines'
gauges are read from the replica rows when somebody scrapes. Times are monotonic seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.api.replica import LoadReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
MAX_USERS = 1000


class Row(Protocol):
    """What is read of a replica."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102
    @property
    def load(self) -> LoadReport | None: ...  # noqa: D102


class Meter:
    """The metrics of one HTTP request; one or more choices."""

    def __init__(self, metrics: Metrics, model: str, tier: str, user: str, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._labels = (model,)
        self._tier, self._user = tier, user
        self._prompt_tokens = prompt_tokens
        self._start = metrics.clock()
        self._last: dict[int, float] = {}
        self._itl = metrics.itl.labels(model)
        self._generated = 0
        self._reasons: list[str] = []
        self._failed = self._closed = False
        metrics.in_flight.labels(model).inc()

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens arrived for `choice`, in one step."""
        if not count:
            return
        now = self._metrics.clock()
        last = self._last.get(choice)
        if last is not None:
            self._itl.observe(now - last)
        elif not self._last:
            self._metrics.ttft.labels(*self._labels).observe(now - self._start)
        self._last[choice] = now
        self._generated += count

    def finished(self, reason: str) -> None:
        """One choice ended with `reason`."""
        self._reasons.append(reason)

    def failed(self) -> None:
        """The request ended with an error after it was accepted, or was refused."""
        self._failed = True

    def close(self) -> None:
        """The request is over; without a reason and without a failure it was aborted by its client."""
        if self._closed:
            return
        self._closed = True
        m, model = self._metrics, self._labels[0]
        m.in_flight.labels(model).dec()
        reasons = ["error"] if self._failed else self._reasons or ["abort"]
        for reason in reasons:
            m.success.labels(model, reason).inc()
        m.requests.labels(self._tier, reasons[0]).inc()
        if self._last:  # work was done: it is counted, whoever ended it
            m.prompt_tokens.labels(model).inc(self._prompt_tokens)
            m.generation_tokens.labels(model).inc(self._generated)
            user = m.user_label(self._user)
            m.user_tokens.labels(self._tier, user, "prompt").inc(self._prompt_tokens)
            m.user_tokens.labels(self._tier, user, "generation").inc(self._generated)
        if self._reasons and not self._failed:
            m.e2e.labels(model).observe(m.clock() - self._start)


class Metrics:
    """All metrics of one front, in a registry of their own. `rows` gives the replicas known at a scrape."""

    def __init__(
        self, rows: Callable[[], Sequence[Row]] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.registry = r = CollectorRegistry()
        model = ("model_name",)
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token.", model, buckets=TTFT_BUCKETS, registry=r
        )
        self.itl = Histogram(
            "vllm:inter_token_latency_seconds",
            "Time between two steps of one answer.",
            model,
            buckets=ITL_BUCKETS,
            registry=r,
        )
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Time from request to the end of its answer.",
            model,
            buckets=E2E_BUCKETS,
            registry=r,
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens served.", model, registry=r)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.", model, registry=r)
        self.success = Counter(
            "vllm:request_success",
            "Choices by the reason of their end (stop, length, abort, error).",
            (*model, "finished_reason"),
            registry=r,
        )
        self.in_flight = Gauge("echelon_front_requests", "Requests that this front is answering.", model, registry=r)
        self.requests = Counter("echelon_requests", "Requests by their outcome.", ("tier", "outcome"), registry=r)
        self.user_tokens = Counter(
            "echelon_user_tokens", "Tokens by user; late ones are 'other'.", ("tier", "user", "kind"), registry=r
        )
        self._users: set[str] = set()
        if rows is not None:
            r.register(_Engines(rows))

    def request(self, model: str, tier: str, user: str, prompt_tokens: int) -> Meter:
        """The meter of a request that starts now."""
        return Meter(self, model, tier, user, prompt_tokens)

    def user_label(self, user: str) -> str:
        """`user`, or "other" once 1,000 are known: a tenant must not be able to grow the page."""
        if user in self._users:
            return user
        if len(self._users) >= MAX_USERS:
            return "other"
        self._users.add(user)
        return user

    def page(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


_GAUGES: tuple[tuple[str, str, Callable[[LoadReport], float]], ...] = (
    ("vllm:num_requests_running", "Sequences with a slot.", lambda w: w.running),
    ("vllm:num_requests_waiting", "Sequences waiting in the engine.", lambda w: w.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV blocks in use, 1 = full.",
        lambda w: 1 - w.free_blocks / w.total_blocks if w.total_blocks else 0.0,
    ),
    ("echelon_prefill_backlog_tokens", "Prompt tokens not yet computed.", lambda w: w.prefill_backlog),
    ("echelon_step_seconds", "Duration of the last step.", lambda w: w.step_seconds),
)
_COUNTERS: tuple[tuple[str, str, Callable[[LoadReport], float]], ...] = (
    ("vllm:num_preemptions", "Preemptions since the replica started.", lambda w: w.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda w: w.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda w: w.prefix_hits),
    ("echelon_steps", "Steps completed.", lambda w: w.step),
)


class _Engines(Collector):
    """The replicas' own numbers, read at a scrape."""

    def __init__(self, rows: Callable[[], Sequence[Row]]) -> None:
        self._rows = rows

    def describe(self) -> Iterable[Metric]:
        """Nothing: or the registry would scrape once to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family a number; `engine` is the replica's id, as vLLM labels it."""
        rows = self._rows()
        up = GaugeMetricFamily("echelon_replica_up", "Whether the replica is ready.", labels=("replica", "state"))
        for row in rows:
            up.add_metric((row.id, row.state), float(row.state == "ready"))
        yield up
        loads = [(row, row.load) for row in rows if row.load is not None]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, value in table:
                family = kind(name, text, labels=("model_name", "engine"))
                for row, load in loads:
                    family.add_metric((row.model, row.id), value(load))
                yield family
