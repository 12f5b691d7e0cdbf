"""What was executed, and for whom: users + overhead == executed, in whole tokens, at any instant.

A token position is charged once, when it is first executed. Recompute after preemption, what a replay runs again, and
what was run for a request that had ended are overhead: nobody's service. Cached tokens are not executed, hence free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workers.api.ordering import Charge


@dataclass(frozen=True, slots=True)
class Prices:
    """Units of service a token. `kv_read`: for each KV token that a decode reads, relative to a prefill token.

    Without it whoever decodes behind a long context pays 2 a token and fills the device (the model of VTC, OSDI'24).
    """

    prefill: float = 1.0
    decode: float = 2.0
    kv_read: float = 0.002

    def units(self, prefill: float, decode: float, kv_read: float) -> float:
        """Service in units of so many tokens."""
        return self.prefill * prefill + self.decode * decode + self.kv_read * kv_read

    def most_a_step(self, max_tokens: int, pool_tokens: int) -> float:
        """U: what one step of at most `max_tokens` over a KV cache of `pool_tokens` can charge at most."""
        return max(self.prefill, self.decode) * max_tokens + self.kv_read * pool_tokens


@dataclass(slots=True)
class Totals:
    """Tokens since the start."""

    prefill: int = 0
    decode: int = 0
    kv_read: int = 0

    @property
    def executed(self) -> int:
        """Tokens that ran for the account."""
        return self.prefill + self.decode


class Ledger:
    """The books, in whole tokens, so that they balance exactly."""

    def __init__(self) -> None:
        self.accounts: dict[tuple[str, str], Totals] = {}
        self.executed = self.overhead = 0

    def book(self, executed: int, charges: Iterable[Charge]) -> None:
        """A step ran `executed` tokens; `charges` say for whom. What they leave open shows in `missing`."""
        self.executed += executed
        for standing, prefill, decode, kv_read, overhead in charges:
            self.overhead += overhead
            if prefill or decode:
                totals = self.accounts.get(standing.key) or self.totals(standing.key)
                totals.prefill += prefill
                totals.decode += decode
                totals.kv_read += kv_read

    def waste(self, tokens: int) -> None:
        """So many tokens ran for nobody."""
        self.executed += tokens
        self.overhead += tokens

    def totals(self, key: tuple[str, str]) -> Totals:
        """Of the account with this key; they may be added to."""
        found = self.accounts.get(key)
        if found is None:
            found = self.accounts[key] = Totals()
        return found

    def by_tier(self) -> dict[tuple[str, str], int]:
        """Tokens by (tier, prefill or decode), and by ("", overhead)."""
        found = {("", "overhead"): self.overhead}
        for (tier, _), totals in self.accounts.items():
            for kind, tokens in (("prefill", totals.prefill), ("decode", totals.decode)):
                found[tier, kind] = found.get((tier, kind), 0) + tokens
        return found

    @property
    def missing(self) -> int:
        """Executed tokens that nobody was charged for (negative: charged, but not executed). 0 in sound books."""
        return self.executed - self.overhead - sum(t.executed for t in self.accounts.values())
