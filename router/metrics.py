"""Prometheus metrics of requests: vLLM's names where the meaning is the same, `echelon_*` for ours.

Requests feed counters and histograms as they happen: `Metrics.request` gives one `Meter` a request. The engines'
numbers are in `router.engine_metrics`, the pages of several fronts become one in `router.metrics_page`. Times are
monotonic seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from router.generation import Trace
from router.step_histogram import StepHistogram

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
ERROR_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
MAX_LABELS = 1000


class Label:
    """Values of one label: the first 1,000, then "other", since a page must not grow for ever."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """`value`, or "other"."""
        if value not in self._known:
            if len(self._known) >= MAX_LABELS:
                return "other"
            self._known.add(value)
        return value


class Meter:
    """The metrics of one request; one or more choices, of one or more prompts. `traces` are its generations'."""

    def __init__(
        self, metrics: Metrics, model: str, tier: str, user: str, prompt_tokens: int, traces: Sequence[Trace]
    ) -> None:
        self._metrics = metrics
        self._model, self._tier, self._user = model, tier, user
        self._traces = traces
        self._clock = metrics.clock
        self._start = self._clock()
        self._last: dict[int, float] = {}
        self._itl = metrics.itl.labels(model, tier)
        self._closed = False
        self.prompt_tokens = prompt_tokens
        self.output_tokens = 0
        self.ttft: float | None = None  # seconds
        self.e2e: float | None = None  # seconds, once closed
        self.reasons: list[str] = []  # of the choices that have ended
        self.failure: str | None = None
        self.prepared = 0.0  # seconds before it started, for body, template and tokenizer
        metrics.in_flight.labels(model).inc()

    def tokens(self, choice: int, count: int) -> None:
        """`count` tokens arrived for `choice`, in one step."""
        if not count:
            return
        now = self._clock()
        last = self._last.get(choice)
        if last is not None:
            self._itl.observe(now - last)
        elif self.ttft is None:
            self.ttft = now - self._start
            self._metrics.ttft.labels(self._model, self._tier).observe(self.ttft)
        self._last[choice] = now
        self.output_tokens += count

    def finished(self, reason: str) -> None:
        """One choice ended with `reason`."""
        self.reasons.append(reason)

    def streamed(self, *, straight: bool) -> None:
        """Events went `straight` to the connection, or through the server's layers."""
        self._metrics.streams.labels("straight" if straight else "asgi").inc()

    def failed(self, code: str, *, refused: bool = False) -> None:
        """The request ended with the error `code`, or was refused before it ran."""
        self.failure = code
        if refused:
            self._metrics.refused(code)

    @property
    def outcome(self) -> str:
        """The first finish reason, "error", or "abort" where the client went away."""
        if self.failure is not None:
            return "error"
        return self.reasons[0] if self.reasons else "abort"

    @property
    def queue_seconds(self) -> float:
        """What the prompt that waited longest waited for leases."""
        return max((t.queue_seconds for t in self._traces), default=0.0)

    @property
    def replica(self) -> str:
        """Where it ran, at last; empty if nowhere."""
        return next((t.replica for t in self._traces if t.replica), "")

    @property
    def replays(self) -> int:
        """Attempts after a replica failed, over all prompts."""
        return sum(t.replays for t in self._traces)

    def parts(self) -> tuple[tuple[str, float], ...]:
        """The spans of its time, once closed, in seconds; their sum is all of it. Replays count as generation."""
        total = self.e2e or 0.0
        first = total if self.ttft is None else self.ttft
        queued = min(self.queue_seconds, first)
        last = max((at - self._start for at in self._last.values()), default=first)
        spans = self.prepared, queued, first - queued, last - first, total - last
        return tuple(zip(("prepare", "queue", "first_token", "generate", "finish"), spans, strict=True))

    def close(self) -> None:
        """The request is over; without a reason and without a failure it was aborted by its client."""
        if self._closed:
            return
        self._closed = True
        m, model, tier = self._metrics, self._model, self._tier
        self.e2e = m.clock() - self._start
        m.in_flight.labels(model).dec()
        for reason in ["error"] if self.failure is not None else self.reasons or ["abort"]:
            m.success.labels(model, reason).inc()
        m.requests.labels(tier, self.outcome).inc()
        if self.replica:
            m.queue_time.labels(model, tier).observe(self.queue_seconds)
            m.replica_requests.labels(m.replica_label(self.replica), self.outcome).inc()
        for trace in self._traces:
            if trace.expected_first and trace.first_seconds:
                error = abs(trace.expected_first - trace.first_seconds) / trace.first_seconds
                m.ttft_error.labels(model).observe(error)
        if self.replays:
            m.replays.labels(model).inc(self.replays)
        if self.ttft is not None:  # work was done: it is counted, whoever ended it
            m.prompt_tokens.labels(model).inc(self.prompt_tokens)
            m.generation_tokens.labels(model).inc(self.output_tokens)
            user = m.user_label(self._user)
            m.user_tokens.labels(tier, user, "prompt").inc(self.prompt_tokens)
            m.user_tokens.labels(tier, user, "generation").inc(self.output_tokens)
        if self.reasons and self.failure is None:
            m.e2e.labels(model, tier).observe(self.e2e)


class Metrics:
    """All metrics of one front, in a registry of their own."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.registry = r = CollectorRegistry()
        self.user_label, self.replica_label, self._refusal_label = Label(), Label(), Label()
        model, both = ("model_name",), ("model_name", "tier")
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "Time to the first token.", both, buckets=TTFT_BUCKETS, registry=r
        )
        self.itl = StepHistogram(
            "vllm:inter_token_latency_seconds", "Time between two steps of one answer.", both, ITL_BUCKETS
        )
        r.register(self.itl)
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Time from request to the end of its answer.",
            both,
            buckets=E2E_BUCKETS,
            registry=r,
        )
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "Time without a lease.", both, buckets=TTFT_BUCKETS, registry=r
        )
        self.ttft_error = Histogram(
            "echelon_ttft_prediction_error",
            "Predicted against actual time from lease to first token: their difference by the actual one.",
            model,
            buckets=ERROR_BUCKETS,
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
        self.tasks = Gauge("echelon_front_tasks", "Tasks of this front's event loop, when last looked at.", registry=r)
        self.requests = Counter("echelon_requests", "Requests by their outcome.", ("tier", "outcome"), registry=r)
        self.replica_requests = Counter(
            "echelon_replica_requests", "Requests by the replica they ended on.", ("replica", "outcome"), registry=r
        )
        self.streams = Counter(
            "echelon_streams", "Answers streamed, by the way of their events (straight, asgi).", ("way",), registry=r
        )
        self.refusals = Counter("echelon_refusals", "Requests refused, by error code.", ("reason",), registry=r)
        self.replays = Counter("echelon_replays", "Attempts after a replica failed.", model, registry=r)
        self.user_tokens = Counter(
            "echelon_user_tokens", "Tokens by user; late ones are 'other'.", ("tier", "user", "kind"), registry=r
        )

    def request(self, model: str, tier: str, user: str, prompt_tokens: int, traces: Sequence[Trace] = ()) -> Meter:
        """The meter of a request that starts now."""
        return Meter(self, model, tier, user, prompt_tokens, traces)

    def refused(self, code: str) -> None:
        """A request was refused with the error `code`."""
        self.refusals.labels(self._refusal_label(code)).inc()

    def look(self) -> None:
        """Count what only the event loop knows; call it there, before `page`."""
        self.tasks.set(len(asyncio.all_tasks()))

    def page(self) -> bytes:
        """Everything, in Prometheus' text format. Any thread."""
        return generate_latest(self.registry)
