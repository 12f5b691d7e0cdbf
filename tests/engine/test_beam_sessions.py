"""Beam searches through the whole path: ingress, dispatcher, and engines whose steps the policy orders."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cluster_site import MODEL, Site, until
from fake_executor import VOCAB, beam_oracle

from router.generation import ChoiceDelta, GenerationRequest
from router.sessions import _Choice, _Run
from workers.api.errors import EngineFault
from workers.api.request import BeamParams, Delta, EngineRequest, FinishReason, SamplingParams

TIERS = """
user_groups: [Platinum, Bronze]
user_group_map:
  Platinum: [{id: vip, quota_pct: 100}]
  Bronze: [{id: crowd, quota_pct: 100}]
"""
CONTEXT = 256


def search(name: str, width: int = 3, output: int = 12, owner: str = "vip") -> GenerationRequest:
    ids = tuple((sum(map(ord, name)) * 7 + i * 5) % VOCAB for i in range(14))
    samplings = tuple(
        SamplingParams(output, temperature=0.0, choice=choice, stop_ids=(3, 11)) for choice in range(width)
    )
    return GenerationRequest(name, MODEL, ids, samplings, owner=owner, beams=BeamParams(width))


async def answers(site: Site, request: GenerationRequest) -> list[Delta]:
    found: dict[int, Delta] = {}

    def take(batch: tuple[ChoiceDelta, ...]) -> bool:
        for choice, delta in batch:
            assert choice not in found, "an answer came twice"
            found[choice] = delta
        return True

    await site.sessions.generate(request, take)
    return [found[choice] for choice in range(len(request.samplings))]


def expected(request: GenerationRequest) -> list[tuple[tuple[int, ...], FinishReason]] | None:
    return beam_oracle(EngineRequest("o", request.prompt_ids, request.samplings[0], beams=request.beams), CONTEXT)


async def test_searches_of_two_tiers_beside_a_crowd() -> None:
    async with Site(TIERS, replicas=2, num_blocks=24) as site:
        asked = [search(f"s{i}", width=1 + i % 4, owner=("vip", "crowd")[i % 2]) for i in range(8)]
        crowd = [asyncio.ensure_future(site.ask(f"c{i}", "crowd", output=30)) for i in range(12)]
        found = await asyncio.gather(*(answers(site, request) for request in asked))
        assert [len(tokens) for tokens in await asyncio.gather(*crowd)] == [30] * 12
    for request, deltas in zip(asked, found, strict=True):
        assert [(delta.token_ids, delta.finish) for delta in deltas] == expected(request)
        assert deltas[0].executed_prefill + deltas[0].cached_tokens == len(request.prompt_ids)


async def test_a_search_whose_link_breaks_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Site(TIERS) as site:
        settled, settle = [], site.sessions.dispatcher.settle
        monkeypatch.setattr(site.sessions.dispatcher, "settle", lambda bill: settled.append(bill) or settle(bill))
        request, engine = search("long", output=200), site.running[0].harness.engine
        asked = asyncio.ensure_future(answers(site, request))
        await until(lambda: engine.stats.decode > 20)
        for link in site.sessions.links.open_links:
            link.close("cut by a test")
        assert [(delta.token_ids, delta.finish) for delta in await asked] == expected(request)
        assert (site.sessions.replays, request.trace.replays) == (1, 1)
        assert [bill.output_tokens for bill in settled] == [0, sum(len(delta.token_ids) for delta in await asked)]
        assert [bill.first_seconds for bill in settled] == [0.0, 0.0], "nobody learns of first tokens from a search's"
        counts = engine.load().requests
        assert (counts.accepted, counts.aborted, counts.completed) == (2, 1, 1)


async def test_who_goes_away_leaves_nothing_behind() -> None:
    async with Site(TIERS) as site:
        engine = site.running[0].harness.engine
        asked = asyncio.ensure_future(answers(site, search("gone", output=200)))
        await until(lambda: engine.stats.decode > 20)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: engine.load().requests.aborted == 1)
        assert engine.load().requests.running == 0


async def test_a_search_that_no_engine_can_run_is_refused_once() -> None:
    async with Site(TIERS, replicas=2) as site:
        asked = search("wide", width=4)
        stops = tuple(range(VOCAB - 3))
        wide = replace(asked, samplings=tuple(replace(one, stop_ids=stops) for one in asked.samplings))
        with pytest.raises(EngineFault, match="invalid: a beam search has 1 to 3 beams"):
            async with asyncio.timeout(10):
                await answers(site, wide)
        assert site.sessions.replays == 0


def test_a_search_of_which_some_answers_came_begins_anew() -> None:
    """They come in several frames where they are long, and a replica may die between two."""
    request = search("half")
    choices = [_Choice(sampling) for sampling in request.samplings]
    choices[0].take(Delta("half#0/0", 0, (1, 2), finish=FinishReason.LENGTH))
    run = _Run(request, choices, 0.0, 2, lambda batch: True)
    assert {asked.resumed_ids for asked, _ in run.engine_requests(0.0).values()} == {()}
