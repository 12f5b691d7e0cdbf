"""How long a replica will take, in seconds, learned from what it reports after each step.

A step is modelled as `base + per_seq * sequences + per_kv * KV tokens + prefill tokens / rate`. The first three are
fitted on steps without prefill by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10); the
rate follows from what the other steps took longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.api.replica import LoadReport

_SEQS = 16.0  # features are scaled to about 1
_KV = 16384.0
_FORGET = 0.97  # a step: about 33 steps are remembered
_OPENED = (100.0, 0.0, 0.0, 100.0, 0.0, 100.0)  # initial covariance: believe the data, not the seed
_WINDUP = 1e4  # directions nobody excites must not grow for ever
_RATE_FORGET = 0.85
_RECOVERED = 0.25  # of what is believed: a canary as quick as this says that the replica is quick again
_SURPRISES = 3  # this many steps off by 2x in a row: the speed changed, learn anew


@dataclass(frozen=True, slots=True)
class Speed:
    """What is believed before anything was measured, and what is known afterwards. Seconds and tokens a second."""

    prefill_rate: float = 4000.0
    base: float = 0.02
    per_seq: float = 0.0
    per_kv: float = 0.0

    def step(self, sequences: float, kv_tokens: float) -> float:
        """Seconds of a decode step."""
        return self.base + self.per_seq * sequences + self.per_kv * kv_tokens

    def scaled(self, rate: float) -> Speed:
        """The same shape at another prefill rate: a machine that is k times as fast is so in all."""
        k = self.prefill_rate / rate
        return Speed(rate, self.base * k, self.per_seq * k, self.per_kv * k)


class SpeedModel:
    """Learns one replica's `speed`."""

    def __init__(self, seed: Speed) -> None:
        self._seed = seed
        self._w = (seed.base, seed.per_seq * _SEQS, seed.per_kv * _KV)
        self._p = _OPENED  # the upper triangle of a symmetric matrix; written out, since each step comes here
        self._decode_steps = 0
        self._prefilled = self._prefill_seconds = 0.0
        self._surprises = 0
        self._usual, self._seqs, self._kv = seed.base, 0.0, 0.0  # means of recent decode steps
        self.speed = seed

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._decode_steps > 0 or self._prefill_seconds > 0.0

    def observe(self, report: LoadReport) -> None:
        """Learn from the step of `report`; steps that ran nothing teach nothing."""
        seconds = report.step_seconds
        if seconds <= 0.0 or report.prefill_tokens + report.decode_tokens == 0:
            return
        if report.prefill_tokens == 0:
            self._observe_decode(report.decode_tokens, report.kv_tokens, seconds)
        else:
            self._observe_prefill(report, seconds)
        self.speed = self._summary()

    def observe_canary(self, seconds: float) -> None:
        """A step of one token took `seconds`. If that is far less than believed, all is so much quicker.

        Never more than believed: one step may be slow for any reason, but none is quick by chance.
        """
        believed = self.speed.step(1, 0)
        if not self.known or not 0.0 < seconds < _RECOVERED * believed:
            return
        k = seconds / believed
        w0, w1, w2 = self._w
        self._w = (k * w0, k * w1, k * w2)
        self._usual *= k
        self._prefill_seconds *= k
        self._p = _OPENED
        self.speed = self._summary()

    def _observe_decode(self, sequences: int, kv_tokens: int, seconds: float) -> None:
        x1, x2 = sequences / _SEQS, kv_tokens / _KV  # x0 is 1
        w0, w1, w2 = self._w
        error = seconds - (w0 + w1 * x1 + w2 * x2)
        if self._decode_steps and not 0.5 < seconds / max(seconds - error, 1e-9) < 2.0:
            self._surprises += 1
            if self._surprises >= _SURPRISES:
                self._p = _OPENED
                self._surprises, self._usual, self._seqs, self._kv = 0, seconds, sequences, kv_tokens
                self._prefilled = self._prefill_seconds = 0.0  # what prefill took is of the old speed
                self._seed = self.speed.scaled(self.speed.prefill_rate * (seconds - error) / seconds)
        else:
            self._surprises = 0
        p00, p01, p02, p11, p12, p22 = self._p
        px0, px1, px2 = p00 + p01 * x1 + p02 * x2, p01 + p11 * x1 + p12 * x2, p02 + p12 * x1 + p22 * x2
        gain = 1.0 / (_FORGET + (px0 + x1 * px1 + x2 * px2))
        forget = 1.0 if p00 + p11 + p22 > _WINDUP else 1.0 / _FORGET
        self._w = (w0 + px0 * gain * error, w1 + px1 * gain * error, w2 + px2 * gain * error)
        self._p = (
            (p00 - px0 * px0 * gain) * forget,
            (p01 - px0 * px1 * gain) * forget,
            (p02 - px0 * px2 * gain) * forget,
            (p11 - px1 * px1 * gain) * forget,
            (p12 - px1 * px2 * gain) * forget,
            (p22 - px2 * px2 * gain) * forget,
        )
        share = 0.1 if self._decode_steps else 1.0
        self._usual += share * (seconds - self._usual)
        self._seqs += share * (sequences - self._seqs)
        self._kv += share * (kv_tokens - self._kv)
        self._decode_steps += 1

    def _observe_prefill(self, report: LoadReport, seconds: float) -> None:
        rest = 0.0
        if self._decode_steps:
            rest = self.speed.step(report.decode_tokens, report.kv_tokens if report.decode_tokens else 0)
        self._prefilled = self._prefilled * _RATE_FORGET + report.prefill_tokens
        self._prefill_seconds = self._prefill_seconds * _RATE_FORGET + max(seconds - rest, 0.1 * seconds)

    def _summary(self) -> Speed:
        rate = self._prefilled / self._prefill_seconds if self._prefill_seconds else self._seed.prefill_rate
        if not self._decode_steps:
            shape = self._seed.scaled(rate)
            return Speed(rate, shape.base, shape.per_seq, shape.per_kv)
        base, per_seq, per_kv = self._w
        per_seq, per_kv = per_seq / _SEQS, per_kv / _KV
        if per_seq < 0.0 or per_kv < 0.0:  # no step is quicker for more work: turn the plane about what is usual
            per_seq, per_kv = max(per_seq, 0.0), max(per_kv, 0.0)
            base = self._usual - per_seq * self._seqs - per_kv * self._kv
        return Speed(rate, min(max(base, 0.1 * self._usual), 2.0 * self._usual), per_seq, per_kv)


def blend(own: Speed, other: Speed, share: float) -> Speed:
    """`own`, moved to `other` by `share` (0 to 1), in times, not in rates."""
    if share <= 0.0:
        return own
    keep = 1.0 - share
    return Speed(
        1.0 / (keep / own.prefill_rate + share / other.prefill_rate),
        keep * own.base + share * other.base,
        keep * own.per_seq + share * other.per_seq,
        keep * own.per_kv + share * other.per_kv,
    )


class OutputLengths:
    """How many tokens answers have, by (owner, route); bounded, the least recently seen is forgotten."""

    def __init__(self, seed: float = 128.0, limit: int = 10_000) -> None:
        self._seed, self._limit = seed, limit
        self._by_key: dict[tuple[str, str], tuple[int, float]] = {}

    def observe(self, owner: str, route: str, tokens: float) -> None:
        """One choice of a completed request had `tokens` tokens."""
        for key in ((owner, route), ("", route)):  # owners are never empty: "" is everybody
            count, mean = self._by_key.pop(key, (0, 0.0))
            count += 1
            self._by_key[key] = (count, mean + (tokens - mean) * max(1.0 / count, 0.1))
        while len(self._by_key) > self._limit:
            self._by_key.pop(next(iter(self._by_key)))

    def expected(self, owner: str, route: str, max_tokens: int) -> float:
        """Expected tokens of a choice, at most `max_tokens`."""
        found = self._by_key.get((owner, route)) or self._by_key.get(("", route))
        return min(found[1] if found else self._seed, float(max_tokens))
