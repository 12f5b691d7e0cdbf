"""A recorded trace, replayed through the shipped dispatcher and engines with another configuration.

One JSON object a line, in any order:

    {"at": 12.5, "user": "anna", "tier": "Silver", "prompt": 812, "output": 190, "prefix": "9f3c", "prefix_tokens": 512}

`at` is in seconds, lengths in tokens. `tier` is the API key's; `prefix` names what the first `prefix_tokens` of the
prompt have in common with other requests, by hash: no text is needed. The last three may be left out.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.dispatch.dispatcher import DispatcherConfig
from router.qos.config import QosConfig
from router.qos.file import load_qos_config
from simulation.cluster import Cluster
from simulation.jobs import Job, again, quantile
from simulation.orderings import orderings_of
from simulation.replica import Shape
from workers.api.errors import ConfigError


class Line(BaseModel):
    """One request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    user: Annotated[str, Field(min_length=1)]
    prompt: Annotated[int, Field(ge=1)]
    output: Annotated[int, Field(ge=1)]
    tier: str = ""
    prefix: str = ""
    prefix_tokens: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class TierRow:
    """One tier under one number of replicas; seconds."""

    replicas: int
    tier: str
    requests: int
    refused: int
    ttft: float
    ttft_p99: float
    itl: float
    itl_p99: float
    waited_p99: float


def read(path: Path) -> list[Job]:
    """The trace. Raises ConfigError with FILE:LINE of what is wrong."""
    jobs: list[Job] = []
    prefixes: dict[str, int] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = Line.model_validate(json.loads(text))
        except (json.JSONDecodeError, ValidationError) as e:
            raise ConfigError(f"{path}:{number}: {e}") from e
        if line.prefix_tokens > line.prompt:
            raise ConfigError(f"{path}:{number}: prefix_tokens {line.prefix_tokens} is more than the prompt")
        prefix = prefixes.setdefault(line.prefix, len(prefixes))
        shared = line.prefix_tokens if line.prefix else 0
        jobs.append(Job(0, line.user, line.prompt, line.output, line.at, line.tier, prefix, shared))
    if not jobs:
        raise ConfigError(f"{path} has no requests")
    jobs.sort(key=lambda j: j.arrived)
    for index, job in enumerate(jobs):
        job.number = index
    return jobs


def run(path: Path, *, qos: Path | None, replicas: Sequence[int], slots: int, pool: int) -> list[TierRow]:
    """The trace under each number of replicas, like an H100 each."""
    jobs = read(path)
    config = None if qos is None else load_qos_config(qos)
    return [row for number in replicas for row in replay(again(jobs), config, Shape(slots, pool=pool), number)]


def replay(jobs: list[Job], qos: QosConfig | None, shape: Shape, replicas: int) -> list[TierRow]:
    """By tier, the highest first."""
    shape = Shape(shape.slots, shape.budget, shape.pool, shape.cost, prefix_caching=any(j.prefix_tokens for j in jobs))
    config = DispatcherConfig(recovery=0.0, canary_every=math.inf, qos=qos)
    longest = max(j.prompt + j.output for j in jobs)
    cluster = Cluster(config, [shape] * replicas, ordering=orderings_of(qos, shape, longest) if qos else None)
    cluster.run(jobs)
    by_tier: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_tier[qos.account(job.user, job.tier).tier.name if qos else "all"].append(job)
    names = [t.name for t in qos.tiers] if qos else ["all"]
    return [_row(replicas, name, by_tier[name]) for name in names if by_tier[name]]


def _row(replicas: int, tier: str, jobs: Iterable[Job]) -> TierRow:
    seen = list(jobs)
    begun = [j for j in seen if j.first is not None]
    ttfts, gaps = [j.ttft for j in begun], [g for j in begun for g in j.gaps]
    waited = [(j.granted or j.arrived) - j.arrived for j in begun]
    return TierRow(
        replicas,
        tier,
        len(seen),
        sum(j.refused for j in seen),
        quantile(ttfts, 0.5),
        quantile(ttfts, 0.99),
        quantile(gaps, 0.5),
        quantile(gaps, 0.99),
        quantile(waited, 0.99),
    )
