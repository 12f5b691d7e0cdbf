"""`Row`: one line of the table of guarantees; and the ways to run a configuration that all of them share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from router.qos.config import Account, QosConfig, Tier
from simulation.jobs import Job, again
from simulation.orderings import limits_of, ordering_of
from simulation.replica import Bench, Shape

SHAPE = Shape()


@dataclass(frozen=True, slots=True)
class Row:
    """`figure` was measured over `trials` runs and must be on the right side of `bound`; `says` what both are."""

    figure: float
    bound: float
    passed: bool
    trials: int
    says: str

    def as_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {
            "figure": round(self.figure, 6),
            "bound": round(self.bound, 6),
            "pass": self.passed,
            "trials": self.trials,
            "says": self.says,
        }


def at_most(figure: float, bound: float, says: str, trials: int = 1) -> Row:
    """It holds if the figure is not above the bound."""
    return Row(figure, bound, figure <= bound, trials, says)


def at_least(figure: float, bound: float, says: str, trials: int = 1) -> Row:
    """It holds if the figure is not below the bound."""
    return Row(figure, bound, figure >= bound, trials, says)


def tiers(*quotas: dict[str, float], **settings: dict[str, Any]) -> QosConfig:
    """Tiers T0, T1, ... of these users; `T1={"min_share": 0.02}` sets limits."""
    made = tuple(Tier(i, f"T{i}", **settings.get(f"T{i}", {})) for i in range(len(quotas)))
    return QosConfig(
        made, tuple(Account(t, u, q) for t, users in zip(made, quotas, strict=True) for u, q in users.items())
    )


def longest_of(jobs: Iterable[Job]) -> float:
    """L, about: the longest context in tokens."""
    return max((j.prompt + j.output for j in jobs), default=0)


def ours(config: QosConfig, jobs: list[Job], shape: Shape = SHAPE, **limits: Any) -> Bench:
    """A replica ordered by the shipped policy, not yet run."""
    return Bench(shape, ordering_of(config, limits_of(shape, longest_of(jobs), **limits)))


def first_come(jobs: list[Job], shape: Shape = SHAPE, **until: float) -> Bench:
    """The same jobs in the same engine, first come, first served."""
    return Bench(shape).run(again(jobs), **until)


def step_units(shape: Shape) -> float:
    """U, by an arithmetic of our own: the most that one step can be charged."""
    return 2.0 * shape.budget + 0.002 * shape.pool


def gap_bound(shape: Shape, longest: float) -> float:
    """2 (U + max(X, E) + w_p L) with X = U and E = X + L, for quota 1."""
    step = step_units(shape)
    return 2.0 * (step + step + longest + longest)
