"""The replicas' own numbers as Prometheus metrics, read from the dispatcher's table when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.dispatch.lease import TierRow, WorkRow
from router.dispatch.rounds import SessionCounts
from router.http.status import ReplicaRow, Status
from workers.api.replica import LoadReport

DISPATCHER = "dispatcher"  # the `engine` of requests that no engine has yet

_GAUGES: tuple[tuple[str, str, Callable[[LoadReport], float]], ...] = (
    ("vllm:num_requests_running", "Sequences with a slot.", lambda w: w.running),
    (
        "vllm:num_requests_waiting",
        "Sequences that wait in an engine, or requests for a lease.",
        lambda w: w.waiting,
    ),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV blocks in use, 1 = full.",
        lambda w: 1 - w.free_blocks / w.total_blocks if w.total_blocks else 0.0,
    ),
    ("echelon_prefill_backlog_tokens", "Prompt tokens not yet computed.", lambda w: w.prefill_backlog),
    ("echelon_step_seconds", "Duration of the last step.", lambda w: w.step_seconds),
    ("echelon_host_blocks", "Blocks of host memory that hold KV cache.", lambda w: w.host_blocks),
    (
        "echelon_host_cache_usage_perc",
        "Share of the blocks of host memory that hold KV cache, 1 = full; 0 where there are none.",
        lambda w: w.host_blocks / w.total_host_blocks if w.total_host_blocks else 0.0,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[LoadReport], float]], ...] = (
    ("vllm:num_preemptions", "Preemptions since the replica started.", lambda w: w.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda w: w.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda w: w.prefix_hits),
    ("echelon_steps_cut", "Steps that ran in parts since the device was out of memory.", lambda w: w.steps_cut),
    ("echelon_steps", "Steps completed, canaries' too.", lambda w: w.step),
    ("echelon_executed_tokens", "Tokens that ran since the replica started.", lambda w: w.executed_tokens),
    ("echelon_blocks_copied_out", "Blocks of KV cache copied to host memory.", lambda w: w.copied_out),
    ("echelon_blocks_copied_in", "Blocks of KV cache copied back from host memory.", lambda w: w.copied_in),
    (
        "echelon_host_prefix_hits",
        "Prompt tokens of vllm:prefix_cache_hits that were found in host memory alone.",
        lambda w: w.host_hits,
    ),
)


_TIER_GAUGES: tuple[tuple[str, str, Callable[[TierRow], float]], ...] = (
    ("echelon_tier_waiting", "Requests without a lease.", lambda t: t.waiting),
    ("echelon_tier_oldest_wait_seconds", "How long the oldest of them has waited.", lambda t: t.oldest_seconds),
    ("echelon_tier_expected_wait_seconds", "How long one more would wait.", lambda t: t.expected_seconds),
    ("qos_service_gap", "Service / quota of two accounts that wait: how far apart, in units.", lambda t: t.gap),
    ("qos_service_gap_bound", "How far apart the same two may be.", lambda t: t.gap_bound),
    (
        "qos_share_error",
        "By how much a share of service differed from its quota's over the last minute, 1 = all of it.",
        lambda t: t.share_error,
    ),
)


class EngineMetrics(Collector):
    """`engine` and `replica` are the replica's id; vLLM's own label is the former."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format. Any thread."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: or the registry would scrape once to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """One family a number. Any thread."""
        rows, waiting = self._status.replicas(), self._status.waiting()
        yield from _states(rows)
        if tiers := self._status.tiers():
            yield from _tiers(tiers)
        if work := self._status.work():
            yield _work(work)
        yield from _sessions(self._status.sessions())
        loads = [(row, row.load) for row in rows if row.load is not None]
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, value in table:
                family = kind(name, text, labels=("model_name", "engine"))
                for row, load in loads:
                    family.add_metric((row.model, row.id), value(load))
                if name == "vllm:num_requests_waiting":
                    for model, count in waiting.items():
                        family.add_metric((model, DISPATCHER), count)
                yield family


def _tiers(rows: Iterable[TierRow]) -> Iterable[Metric]:
    labels = ("model_name", "tier")
    for name, text, value in _TIER_GAUGES:
        family = GaugeMetricFamily(name, text, labels=labels)
        for row in rows:
            family.add_metric((row.model, row.tier), value(row))
        yield family
    violations = CounterMetricFamily("qos_bound_violations", "Intervals with a gap beyond its bound.", labels=labels)
    for row in rows:
        violations.add_metric((row.model, row.tier), row.violations)
    yield violations


def _work(rows: Iterable[WorkRow]) -> Metric:
    family = CounterMetricFamily(
        "qos_tokens",
        "Tokens executed for the users of a tier, or for nobody (overhead: recomputed, discarded). They sum to all.",
        labels=("model_name", "tier", "kind"),
    )
    for row in rows:
        family.add_metric((row.model, row.tier, row.kind), row.tokens)
    return family


def _sessions(counts: SessionCounts) -> Iterable[Metric]:
    yield GaugeMetricFamily("echelon_sessions", "Interactive sessions whose history is held.", counts.held)
    yield GaugeMetricFamily("echelon_session_rounds", "Rounds of sessions under way.", counts.running)
    yield GaugeMetricFamily("echelon_session_bytes", "Memory that sessions' histories take.", counts.bytes)
    evicted = CounterMetricFamily(
        "echelon_sessions_evicted",
        "Histories given up, since they expired, or for the limit on count, memory or the size of one.",
        labels=("reason",),
    )
    for reason, count in counts.evicted:
        evicted.add_metric((reason,), count)
    yield evicted


def _states(rows: Iterable[ReplicaRow]) -> Iterable[Metric]:
    up = GaugeMetricFamily("echelon_replica_up", "Whether the replica is ready.", labels=("replica", "state"))
    proof = GaugeMetricFamily(
        "echelon_replica_since_step_seconds", "Time since its last step, a canary's too.", labels=("replica",)
    )
    for row in rows:
        up.add_metric((row.id, row.state), float(row.state == "ready"))
        proof.add_metric((row.id,), row.since_step)
    return (up, proof)
