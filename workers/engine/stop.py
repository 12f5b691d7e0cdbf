"""When a sequence ends, and which requests cannot run at all."""

from __future__ import annotations

from collections.abc import Iterable

from workers.api.errors import ContextLengthExceeded, InvalidRequest
from workers.api.request import MAX_BEAMS, MAX_LENGTH_PENALTY, BeamParams, EngineRequest, FinishReason, SamplingParams
from workers.engine.sequence import Sequence

MAX_TOKEN_ID = 2**31  # what a rank's int32 tensors hold


def finish_reason(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with its last known token, or None. A stop id counts only after `min_tokens` others, or
    where a grammar let it through.
    """
    token_ids = sequence.token_ids
    if token_ids[-1] in sequence.stop_ids and (
        sequence.num_emitted > sequence.request.sampling.min_tokens or sequence.grammar is not None
    ):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(token_ids) >= sequence.limit else None


def validate(request: EngineRequest, context: int, vocab_size: int | None) -> None:
    """Nothing, if the request can run to its end in a context of `context` tokens.

    Raises InvalidRequest, or ContextLengthExceeded if prompt and resumed tokens leave no room for another.
    """
    sampling = request.sampling
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if request.adapter is not None:
        raise InvalidRequest("this model takes no adapters", param="model")
    if request.grammar is not None and not sampling.stop_ids:
        raise InvalidRequest("structured output needs a token that ends it", param="stop_token_ids")
    if request.media:
        raise InvalidRequest("this model takes no images", param="messages")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {sampling.max_tokens}", param="max_tokens")
    if len(request.resumed_ids) >= sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.resumed_ids)} tokens are resumed: nothing is left of max_tokens {sampling.max_tokens}",
            param="max_tokens",
        )
    known = len(request.prompt_ids) + len(request.resumed_ids)
    if known >= context:
        raise ContextLengthExceeded(
            f"the prompt has {known} tokens; this model's context of {context} tokens leaves no room for an answer"
        )
    limit = MAX_TOKEN_ID if vocab_size is None else vocab_size
    _check_ids(request.prompt_ids, limit, "prompt")
    _check_ids(request.resumed_ids, limit, "prompt")
    _check_ids(sampling.stop_ids, limit, "stop_token_ids")
    _check_ids(sampling.allowed_ids, limit, "allowed_token_ids")
    _check_ids([token for token, _ in sampling.logit_bias], limit, "logit_bias")
    _check_ids([token for word in sampling.bad_words for token in word], limit, "bad_words")
    _check_ids(sampling.logprob_ids, limit, "logprob_token_ids")
    if not all(sampling.bad_words):
        raise InvalidRequest("a bad word has no tokens", param="bad_words")
    if request.beams is not None:
        _check_beams(request, request.beams, limit)


def _check_beams(request: EngineRequest, beams: BeamParams, vocab_size: int) -> None:
    """Raises InvalidRequest unless the search has all its answers, and all that is asked has a say in them."""
    sampling = request.sampling
    plain = SamplingParams(
        sampling.max_tokens,
        seed=sampling.seed,
        temperature=0.0,
        stop_ids=sampling.stop_ids,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
    if sampling != plain or request.grammar is not None or request.resumed_ids:
        raise InvalidRequest("a beam search takes limits and stop ids only", param="use_beam_search")
    most = min(MAX_BEAMS, vocab_size - len(set(sampling.stop_ids)))
    if not 1 <= beams.width <= most:
        raise InvalidRequest(f"a beam search has 1 to {most} beams, got {beams.width}", param="n")
    if not abs(beams.length_penalty) <= MAX_LENGTH_PENALTY:  # NaN, too
        raise InvalidRequest(
            f"a length penalty is from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {beams.length_penalty}",
            param="length_penalty",
        )


def _check_ids(ids: Iterable[int], limit: int, param: str) -> None:
    low, high = min(ids, default=0), max(ids, default=0)
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"token id {wrong} of {param} is outside the vocabulary of {limit}", param=param)
