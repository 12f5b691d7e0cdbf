"""One line for every finished request, through `logging`: who, what, where and how long; never its text, never a key.

The fields travel in the record's `fields`; a formatter writes them.
"""

from __future__ import annotations

import logging
from typing import Any

from router.http.identity import Identity
from router.http.job import Job
from router.metrics import Meter

log = logging.getLogger("echelon.requests")


def log_finished(job: Job, meter: Meter, cached_tokens: int) -> None:
    """`job` is over and `meter` closed. `error` is the code of the error that its client got."""
    request = job.requests[0]
    fields: dict[str, Any] = {
        "owner": request.owner,
        "tier": request.tier,
        "route": request.route,
        "model": job.model,
        "replica": meter.replica,
        "replays": meter.replays,
        "prompt_tokens": meter.prompt_tokens,
        "cached_tokens": cached_tokens,
        "output_tokens": meter.output_tokens,
        "queue_ms": _ms(meter.queue_seconds),
        "ttft_ms": _ms(meter.ttft),
        "e2e_ms": _ms(meter.e2e),
        "finish_reason": None if meter.failure is not None else meter.outcome,
        "error": meter.failure,
    }
    log.info("request finished", extra={"fields": fields})


def log_refused(identity: Identity, route: str, code: str) -> None:
    """A body was refused before there was anything to run."""
    fields = {"owner": identity.owner, "tier": identity.tier, "route": route, "error": code}
    log.info("request refused", extra={"fields": fields})


def log_relayed(identity: Identity, route: str, model: str, meter: Meter) -> None:
    """A foreign node's answer has ended; token counts are as far as they are known."""
    fields: dict[str, Any] = {
        "owner": identity.owner,
        "tier": identity.tier,
        "route": route,
        "model": model,
        "replica": meter.replica,
        "replays": meter.replays,
        "prompt_tokens": meter.prompt_tokens,
        "output_tokens": meter.output_tokens,
        "queue_ms": _ms(meter.queue_seconds),
        "ttft_ms": _ms(meter.ttft),
        "e2e_ms": _ms(meter.e2e),
        "error": meter.failure,
    }
    log.info("request relayed", extra={"fields": fields})


def log_kept(identity: Identity, route: str) -> None:
    """The answer was one that had been kept."""
    fields = {"owner": identity.owner, "tier": identity.tier, "route": route}
    log.info("request answered before", extra={"fields": fields})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)
