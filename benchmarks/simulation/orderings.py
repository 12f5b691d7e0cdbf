"""The shipped order of engine steps, as a replica of the simulation gets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from router.qos.config import QosConfig
from router.qos.ledger import Prices
from router.qos.policy import Limits, Policy
from router.qos.steps import StepOrder, step_limits
from simulation.replica import Shape, VirtualReplica


def limits_of(shape: Shape, longest: float, **changes: Any) -> Limits:
    """Of an engine of this shape whose contexts have at most `longest` tokens."""
    limits = step_limits(Prices(), step_tokens=shape.budget, pool_tokens=shape.pool, context=round(longest))
    return replace(limits, **changes)


def ordering_of(config: QosConfig, limits: Limits, prices: Prices | None = None) -> StepOrder:
    """For one engine."""
    return StepOrder(config, limits, prices)


def orderings_of(config: QosConfig, shape: Shape, longest: float) -> Callable[[int], StepOrder]:
    """For each of several engines, by number."""
    return lambda number: ordering_of(config, limits_of(shape, longest))


def policy_of(replica: VirtualReplica) -> Policy:
    """What orders its steps."""
    order = replica.engine.ordering
    assert isinstance(order, StepOrder)
    return order.policy
