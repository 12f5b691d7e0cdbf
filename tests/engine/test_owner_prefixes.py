"""From API keys to prefix hits: an owner's keys share what is cached, two owners never do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_runs import Harness

from router.generation import ChoiceDelta, GenerationRequest, Sink
from router.http.config import ServedModel
from router.http.identity import Identity
from router.keys.ring import KeyEntry, KeyRing, digest_of
from router.service import Service
from router.sessions import _Choice, _Run
from router.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "configs" / "demo-model"
KEYS = {"a1": "anna", "a2": "anna", "b": "ben", "c": "ann"}


class InProcess:
    """The `Generator` of one engine."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    async def generate(self, request: GenerationRequest, sink: Sink) -> None:
        choices = [_Choice(s) for s in request.samplings]
        ((asked, _),) = _Run(request, choices, 0.0, len(choices), sink).engine_requests(0.0).values()
        self.harness.submit(asked)
        self.harness.drain()
        tokens, last = self.harness.receiver.tokens[asked.id], self.harness.receiver.last[asked.id]
        assert len(tokens) == len(last.token_ids) == 1
        sink((ChoiceDelta(0, last),))


@pytest.mark.parametrize("cache_salt", [{}, {"cache_salt": "anna"}])
async def test_hits_stay_with_their_owner(cache_salt: dict[str, str]) -> None:
    harness = Harness()
    service = Service([ServedModel("m", Tokenizer.from_folder(DEMO), 128)], InProcess(harness))
    ring = KeyRing(KeyEntry(digest_of(k.encode()), owner) for k, owner in KEYS.items())

    async def cached(identity: Identity, **more: str) -> int:
        body = {"model": "m", "prompt": list(range(20, 40)), "max_tokens": 1, **more}
        answer = await service.answer("/v1/completions", json.dumps(body).encode(), identity)
        return answer.usage.cached_tokens

    found = {key: await cached(ring.identity(key.encode())) for key in ("a1", "b", "c", "a2")}
    assert found == {"a1": 0, "b": 0, "c": 0, "a2": 16}
    assert await cached(Identity()) == 0  # nor with those who need no key
    assert await cached(ring.identity(b"b"), **cache_salt) == (0 if cache_salt else 16)
    harness.engine.check_ledgers()
    service.close()
