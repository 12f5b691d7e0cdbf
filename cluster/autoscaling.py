"""Ray Serve's autoscaling, fed with what the dispatcher knows: Serve itself sees none of our leases.

The supervisors hand Serve what the dispatcher last told them (`stats_of`); Serve's controller asks our policy, which is
`router.dispatch.scaling` behind Serve's types. Alpha API of Ray 2.60.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from router.dispatch.scaling import FleetLoad, Scaler, ScalingConfig

LOOK_BACK_SECONDS = 10.5  # of figures that Serve keeps; it takes one each fifth of it, and refuses 10 and less some day


def stats_of(load: FleetLoad) -> dict[str, float]:
    """What a supervisor reports."""
    return {name: float(value) for name, value in asdict(load).items()}


class ExpectedWaitPolicy:
    """Serve makes one for each deployment, with `policy_kwargs`, and calls it about ten times a second."""

    def __init__(self, **config: Any) -> None:
        self._scaler = Scaler(ScalingConfig(**config))

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas that there should be, and no state that Serve would keep."""
        wanted = self._scaler.decide(time.monotonic(), ctx.target_num_replicas, latest_load(ctx))
        return wanted, {}


def latest_load(ctx: AutoscalingContext) -> FleetLoad | None:
    """The youngest report of all replicas, which all tell of the whole fleet; None: there is none."""
    metrics = ctx.raw_metrics or {}
    last: dict[str, Any] = {}
    for name in stats_of(FleetLoad()):
        points = [series[-1] for series in metrics.get(name, {}).values() if series]
        if not points:
            return None
        last[name] = max(points, key=lambda point: point.timestamp).value
    return FleetLoad(int(last["ready"]), int(last["waiting"]), last["wait_seconds"], last["busy"])


def serve_autoscaling(scaling: ScalingConfig, replicas: int) -> AutoscalingConfig:
    """Serve's configuration: bounds, and our policy with no delays and factors of Serve's own. It begins with
    `replicas`.
    """
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        initial_replicas=replicas,
        max_replicas=scaling.max_replicas,
        look_back_period_s=LOOK_BACK_SECONDS,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function="cluster.autoscaling:ExpectedWaitPolicy", policy_kwargs=asdict(scaling)
        ),
    )
