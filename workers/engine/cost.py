"""What a step costs in time, learned from the steps that ran, so that what low flows add to it can be bounded.

A step is modelled as `base + prefill tokens * a + decode rows * b + KV tokens that they read * c + pairs * d`, all
non-negative; a pair is a prefill token and a position that it looks back on. Least squares with forgetting, and a weak
pull to what was believed before (a ridge), by coordinate descent (Wright, Mathematical Programming 151, 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

_SCALES = (1.0, 512.0, 16.0, 16384.0, 512.0 * 4096.0)  # features are about 1
_SIZE = len(_SCALES)
_KEEP = 0.99  # a step: about a hundred are remembered
_PULL = 1e-3  # of a belief, against the weight 1 of a step just seen
_LEARN_EVERY = 16  # steps, and after each that was predicted badly
_OFF = 0.1  # of what a step took: predicted badly
_SWEEPS = 12
_SETTLED = 1e-4  # of the greatest weight: a sweep that moves none by more is the last


def pairs_of(start: int, count: int) -> float:
    """Pairs of a chunk of `count` prefill tokens from position `start` on. Those of its parts add up to it."""
    return count * (start + 0.5 * count)


@dataclass(frozen=True, slots=True)
class StepPrices:
    """Seconds: of a step that runs nothing, of a prefill token, of a decode row, of a KV token that a decode reads, of
    a pair. The first belief is an 8B model on an H100: 0.5 MFLOP a pair at 250 TFLOP/s.
    """

    base: float = 0.005
    prefill: float = 25e-6
    row: float = 20e-6
    kv: float = 43e-9
    pair: float = 2e-9

    def step(self, prefill: int, rows: int, kv_tokens: int, pairs: float) -> float:
        """A whole step."""
        return self.base + prefill * self.prefill + rows * self.row + kv_tokens * self.kv + pairs * self.pair

    def decodes(self, rows: int, kv_tokens: int) -> float:
        """What decodes add to a step."""
        return rows * self.row + kv_tokens * self.kv

    def chunk(self, start: int, count: int) -> float:
        """What `count` prefill tokens from position `start` on add to a step."""
        return count * self.prefill + pairs_of(start, count) * self.pair

    def fitting(self, start: int, count: int, seconds: float) -> int:
        """How many of `count` prefill tokens from position `start` on take at most `seconds`.

        One at least where its own price leaves room for it, so that whoever has a turn goes on; the step then takes
        longer by what one token looks back on.
        """
        if self.chunk(start, count) <= seconds:
            return count
        if seconds < self.prefill:
            return 0
        slope = self.prefill + start * self.pair
        divisor = slope + sqrt(slope * slope + 2.0 * self.pair * seconds)  # of count^2 pair / 2 + count slope = seconds
        return max(int(2.0 * seconds / divisor), 1) if divisor else 1


class StepCost:
    """Learns the `prices` of one engine's steps."""

    def __init__(self, prices: StepPrices | None = None) -> None:
        self.prices = prices or StepPrices()
        self._squares = [[0.0] * _SIZE for _ in range(_SIZE)]
        self._products = [0.0] * _SIZE
        self._unlearned = 0  # steps seen since prices were learned

    def observe(self, seconds: float, prefill: int, rows: int, kv_tokens: int, pairs: float) -> None:
        """A step of so many prefill tokens, decode rows and so on took the device `seconds`; 0 teaches nothing."""
        if seconds <= 0.0:
            return
        _, by_prefill, by_row, by_kv, by_pair = _SCALES
        features = (1.0, prefill / by_prefill, rows / by_row, kv_tokens / by_kv, pairs / by_pair)
        _, x1, x2, x3, x4 = features
        for i, x in enumerate(features):
            row = self._squares[i]
            self._products[i] = self._products[i] * _KEEP + x * seconds
            row[0] = row[0] * _KEEP + x
            row[1] = row[1] * _KEEP + x * x1
            row[2] = row[2] * _KEEP + x * x2
            row[3] = row[3] * _KEEP + x * x3
            row[4] = row[4] * _KEEP + x * x4
        self._unlearned += 1
        off = self.prices.step(prefill, rows, kv_tokens, pairs) - seconds
        if self._unlearned >= _LEARN_EVERY or abs(off) > _OFF * seconds:
            self._learn()

    def _learn(self) -> None:
        self._unlearned = 0
        before = self.prices
        prices = (before.base, before.prefill, before.row, before.kv, before.pair)
        believed = [w * s for w, s in zip(prices, _SCALES, strict=True)]
        weights = list(believed)
        for _ in range(_SWEEPS):
            moved = 0.0
            for i, row in enumerate(self._squares):
                rest = sum([x * w for x, w in zip(row, weights, strict=True)]) - row[i] * weights[i]
                weight = max((self._products[i] - rest + _PULL * believed[i]) / (row[i] + _PULL), 0.0)
                moved = max(moved, abs(weight - weights[i]))
                weights[i] = weight
            if moved <= _SETTLED * max(weights):
                break
        self.prices = StepPrices(*(w / s for w, s in zip(weights, _SCALES, strict=True)))
