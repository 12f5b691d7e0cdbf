"""Canaries: one token from a replica that has nothing to do, so that a hung one is known before a user meets it.

An engine's loop may report while its device hangs; only a step proves the device. The canary travels over the
dispatcher's own connection: it is no lease, has no owner, and its prompt is shorter than a block, so that the prefix
cache never holds it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from workers.api.request import Delta, EngineRequest, FinishReason, SamplingParams

_SALT = b"canary"


def canary_request() -> EngineRequest:
    """One prompt token, one greedy token."""
    return EngineRequest(
        id=f"canary-{uuid.uuid4().hex}",
        prompt_ids=(0,),
        sampling=SamplingParams(max_tokens=1, temperature=0.0),
        salt=_SALT,
    )


def canary_fault(last: Delta) -> str | None:
    """What is wrong with the end of a canary; None if it is well."""
    if last.finish in (FinishReason.LENGTH, FinishReason.STOP):
        return None
    return last.error or f"it ended with {last.finish}"


@dataclass(slots=True)
class Canary:
    """What steps and canaries have proved of one replica. Times are of the dispatcher's clock, in seconds."""

    stepped_at: float = float("-inf")  # when the last step was completed
    sent_at: float = float("-inf")
    is_out: bool = False  # sent, and not come back
    failures: int = 0  # one after the other, up to the last one

    @property
    def failed(self) -> bool:
        """Whether the last one did."""
        return self.failures > 0

    def due(self, now: float, every: float) -> bool:
        """Whether none is out, and neither a step nor a canary was seen for `every` seconds."""
        return not self.is_out and now - max(self.stepped_at, self.sent_at) > every

    def send(self, now: float) -> None:
        """One is on its way."""
        self.is_out, self.sent_at = True, now

    def end(self, now: float, *, well: bool) -> None:
        """It came back; a step that gave no token proves nothing."""
        self.is_out = False
        self.failures = 0 if well else self.failures + 1
        self.stepped_at = now if well else float("-inf")
