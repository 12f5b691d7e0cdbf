"""How well a model predicts given texts, from log-probabilities of their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from router.http.identity import Identity
from router.http.reading import Answer
from router.service import Service
from workers.api.errors import InvalidRequest
from workers.api.request import TokenLogprobs

ROUTE = "/v1/completions"


def mean_loss(logprobs: Sequence[TokenLogprobs]) -> float:
    """The mean negative log-likelihood, nats a token; exp of it is the perplexity. Raises InvalidRequest of nothing."""
    if not logprobs:
        raise InvalidRequest("Invalid 'prompt': a prompt of one token has nothing to predict.", param="prompt")
    return -sum(one.logprob for one in logprobs) / len(logprobs)


def body_of(prompts: Any, model: str) -> bytes:
    """The body that asks for the log-probabilities of `prompts`: a text, token ids, or a list of either.

    Raises InvalidRequest for what JSON cannot hold.
    """
    body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    try:
        return json.dumps(body).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidRequest(f"the prompt is not what JSON can hold: {e}") from e


async def get_ppl(service: Service, identity: Identity, prompts: Any, model: str) -> float | list[float]:
    """The `mean_loss` of one prompt, or of each of a list of them. Raises EchelonError, as HTTP would refuse it."""
    answer: Answer = await service.answer(ROUTE, body_of(prompts, model), identity)
    losses = [mean_loss(choice.prompt) for choice in answer.choices]
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    return losses[0] if one else losses
