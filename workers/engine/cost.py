"""What a step costs in time, learned from the steps that ran, so that what low flows add to it can be bounded.

A step is modelled as `base + prefill tokens * a + decode rows * b + KV tokens that they read * c`, all non-negative:
least squares with forgetting, and a weak pull to what was believed before (a ridge), by coordinate descent (Wright,
Mathematical Programming 151, 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

_SCALES = (1.0, 512.0, 16.0, 16384.0)  # features are about 1
_KEEP = 0.99  # a step: about a hundred are remembered
_PULL = 1e-3  # of a belief, against the weight 1 of a step just seen
_LEARN_EVERY = 16  # steps; the first ones are learned from at once
_SWEEPS = 12


@dataclass(frozen=True, slots=True)
class StepPrices:
    """Seconds: of a step that runs nothing, of a prefill token, of a decode row, of a KV token that a decode reads."""

    base: float = 0.005
    prefill: float = 25e-6
    row: float = 20e-6
    kv: float = 43e-9

    def decodes(self, rows: int, kv_tokens: int) -> float:
        """What decodes add to a step."""
        return rows * self.row + kv_tokens * self.kv


class StepCost:
    """Learns the `prices` of one engine's steps."""

    def __init__(self, prices: StepPrices | None = None) -> None:
        self.prices = prices or StepPrices()
        self._squares = [[0.0] * 4 for _ in range(4)]
        self._products = [0.0] * 4
        self._seen = 0

    def observe(self, seconds: float, prefill: int, rows: int, kv_tokens: int) -> None:
        """A step with so many prefill tokens and decode rows took the device `seconds`; 0 teaches nothing."""
        if seconds <= 0.0:
            return
        features = (1.0, prefill / 512.0, rows / 16.0, kv_tokens / 16384.0)
        for i, x in enumerate(features):
            row = self._squares[i]
            self._products[i] = self._products[i] * _KEEP + x * seconds
            row[0] = row[0] * _KEEP + x
            row[1] = row[1] * _KEEP + x * features[1]
            row[2] = row[2] * _KEEP + x * features[2]
            row[3] = row[3] * _KEEP + x * features[3]
        self._seen += 1
        if self._seen % _LEARN_EVERY == 0 or self._seen in (1, 2, 4, 8):
            self._learn()

    def _learn(self) -> None:
        before = self.prices
        believed = [w * s for w, s in zip((before.base, before.prefill, before.row, before.kv), _SCALES, strict=True)]
        weights = list(believed)
        for _ in range(_SWEEPS):
            for i in range(4):
                row = self._squares[i]
                rest = sum(row[j] * weights[j] for j in range(4)) - row[i] * weights[i]
                weights[i] = max((self._products[i] - rest + _PULL * believed[i]) / (row[i] + _PULL), 0.0)
        base, prefill, decode_row, kv = (w / s for w, s in zip(weights, _SCALES, strict=True))
        self.prices = StepPrices(base, prefill, decode_row, kv)
