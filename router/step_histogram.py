"""A histogram for what is observed every token: prometheus_client's takes locks and walks over the buckets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Series:
    """The observations under one set of labels. `observe` is for one thread, that of the event loop."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class StepHistogram(Collector):
    """Shows like `prometheus_client.Histogram`; `bounds` are the upper ones of the buckets, ascending, without +Inf."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, tuple(bounds)
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> Series:
        """The series of these label values."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._bounds)
        return series

    def collect(self) -> Iterable[Metric]:
        """For the page."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*(repr(float(b)) for b in self._bounds), "+Inf"]
        for values, series in self._series.items():
            running, buckets = 0, []
            for name, count in zip(names, series.counts, strict=True):
                running += count
                buckets.append((name, float(running)))
            family.add_metric(values, buckets, series.total)
        yield family
