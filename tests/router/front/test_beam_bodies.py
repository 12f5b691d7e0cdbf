"""`use_beam_search` in bodies: what the engine is asked, and what is shown of its answers.

Mutant seen to fail: a filter of draws that is passed on.
"""

from __future__ import annotations

import pytest

from workers.api.request import BeamParams

from .test_bad_inputs import CHAT, COMPLETION
from .test_more_parameters import HI, post

PROMPT = {"prompt": "hello"}


@pytest.mark.parametrize(("path", "body"), [(CHAT, HI), (COMPLETION, PROMPT)])
async def test_the_engine_is_asked_for_one_search_as_wide_as_there_are_choices(client, generator, path, body):
    found = await post(
        client, path, **body, n=3, use_beam_search=True, length_penalty=0.5, top_p=0.3, top_k=5, min_p=0.1
    )
    (request,) = generator.requests
    assert request.beams == BeamParams(3, 0.5)
    for choice, sampling in enumerate(request.samplings):
        assert (sampling.choice, sampling.temperature, sampling.top_p) == (choice, 0.0, 1.0)
        assert (sampling.top_k, sampling.min_p, sampling.logprobs) == (0, 0.0, None)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]


async def test_without_it_there_is_none(client, generator):
    await post(client, COMPLETION, **PROMPT, use_beam_search=False, length_penalty=1.0)
    assert generator.requests[0].beams is None


async def test_what_the_prompt_found_in_the_cache_is_told_once(client, generator):
    generator.cached = 2
    found = await post(client, COMPLETION, **PROMPT, n=3, use_beam_search=True)
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_the_best_are_told_without_log_probabilities(client, generator):
    await post(client, COMPLETION, **PROMPT, n=2, best_of=4, use_beam_search=True)
    assert generator.requests[0].beams == BeamParams(4, 1.0)
    assert {sampling.logprobs for sampling in generator.requests[0].samplings} == {None}
