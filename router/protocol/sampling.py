"""From a checked body to the engine's `SamplingParams`: context and product limits, ids within the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from router.protocol.openai import Common
from workers.api.errors import ContextLengthExceeded, InvalidRequest
from workers.api.request import SamplingParams

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Caps on one HTTP request, products included. Counts."""

    max_choices: int = 128  # n x prompts
    max_total_tokens: int = 1 << 20  # n x prompts x max_tokens
    max_logprobs: int = 1 << 20  # n x prompts x max_tokens x (logprobs + 1)
    max_stop_ids: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a request is checked against."""

    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]


def check_ids(ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for an id outside the vocabulary."""
    if ids and max(ids) >= vocab_size:
        raise InvalidRequest(
            f"Invalid '{param}': {max(ids)} is not a token id of this model, which has {vocab_size}.",
            param=param,
            code="invalid_value",
        )


def check_products(body: Common, prompts: int, limits: RequestLimits) -> None:
    """Raises InvalidRequest when n x prompts (x tokens, x logprobs) is over a cap. Needs no tokens: ask it first."""
    choices = body.asked_choices * prompts
    if choices > limits.max_choices:
        param = "prompt" if prompts > 1 else "n" if body.n == body.asked_choices else "best_of"
        raise InvalidRequest(
            f"Invalid '{param}': n x prompts is {choices}, but this server answers at most {limits.max_choices} "
            "choices a request.",
            param=param,
            code="integer_above_max_value" if prompts == 1 else "array_above_max_length",
        )
    if body.asked_tokens is not None and choices > 1 and choices * body.asked_tokens > limits.max_total_tokens:
        raise InvalidRequest(
            f"Invalid 'max_tokens': n x prompts x max_tokens is {choices * body.asked_tokens}, but this server makes "
            f"at most {limits.max_total_tokens} tokens a request.",
            param="max_tokens",
            code="integer_above_max_value",
        )


def room(body: Common, prompt_tokens: int, choices: int, model: ModelFacts, limits: RequestLimits, param: str) -> int:
    """`max_tokens` of each choice for a prompt of that length. Raises ContextLengthExceeded."""
    noun, context = ("messages" if param == "messages" else "prompt"), model.context_length
    left = context - prompt_tokens
    if left < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, your {noun} resulted in "
            f"{prompt_tokens} tokens. Please reduce the length of the {noun}.",
            param=param,
        )
    asked = body.asked_tokens
    if asked is None:
        return max(1, min(left, limits.max_total_tokens // choices))
    if asked > left:
        if body.max_tokens is None and body.asked_tokens == 16:
            return left  # a default, not a wish
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{prompt_tokens + asked} tokens ({prompt_tokens} in the {noun}, {asked} in the completion). "
            f"Please reduce the length of the {noun} or completion.",
            param=param,
        )
    return asked


def samplings(
    body: Common,
    prompt_tokens: int,
    max_tokens: int,
    seed: int,
    model: ModelFacts,
    limits: RequestLimits,
    bad_words: tuple[tuple[int, ...], ...] = (),
    prompts: int = 1,
) -> tuple[SamplingParams, ...]:
    """One `SamplingParams` for each choice of a prompt; `seed` is the drawn one, the body's own wins. `bad_words` are
    the body's, as ids. The body has so many `prompts`, of `prompt_tokens` together.

    Log-probabilities of the prompt are the first choice's.
    """
    check_ids(body.stop_token_ids, model.vocab_size, "stop_token_ids")
    check_ids(body.allowed_token_ids, model.vocab_size, "allowed_token_ids")
    check_ids(tuple(i for i, _ in body.logit_bias), model.vocab_size, "logit_bias")
    check_ids(body.logprob_token_ids, model.vocab_size, "logprob_token_ids")
    if len(body.stop_token_ids) > limits.max_stop_ids:
        raise InvalidRequest(
            f"Invalid 'stop_token_ids': array too long. Expected an array with maximum length {limits.max_stop_ids}, "
            f"but got an array with length {len(body.stop_token_ids)} instead.",
            param="stop_token_ids",
            code="array_above_max_length",
        )
    n, top = body.asked_choices, body.asked_logprobs
    if top is None and n > (body.n or 1) and body.beams is None:
        top = 0  # by which the best are told
    if body.logprob_token_ids:
        top = 0  # they stand in the place of the likeliest
    shown = max(top or 0, len(body.logprob_token_ids))
    if top is not None and n * prompts * max_tokens * (shown + 1) > limits.max_logprobs:
        raise InvalidRequest(
            f"Invalid 'logprobs': n x prompts x max_tokens x alternatives is over {limits.max_logprobs}; ask for "
            "fewer.",
            param=next((p for p in ("logprob_token_ids", "top_logprobs") if p in body.model_fields_set), "logprobs"),
            code="invalid_value",
        )
    of_prompt = body.asked_prompt_logprobs
    if of_prompt is not None and prompt_tokens * (of_prompt + 1) > limits.max_logprobs:
        raise InvalidRequest(
            f"Invalid 'prompt_logprobs': tokens of all prompts x alternatives is over {limits.max_logprobs}; ask for "
            "fewer.",
            param="prompt_logprobs" if "prompt_logprobs" in body.model_fields_set else "logprobs",
            code="invalid_value",
        )
    # A grammar lets the end come where it accepts, and only there.
    ends = () if body.ignore_eos and body.asked_grammar is None else model.eos_ids
    stop_ids = (*ends, *body.stop_token_ids)
    draws = body.beams is None  # else, as at temperature 0, what filters draws has no say
    return tuple(
        SamplingParams(
            max_tokens=max_tokens,
            temperature=(1.0 if body.temperature is None else float(body.temperature)) if draws else 0.0,
            top_k=max(0, body.top_k or 0) if draws else 0,
            top_p=1.0 if body.top_p is None or not draws else float(body.top_p),
            min_p=float(body.min_p or 0.0) if draws else 0.0,
            presence_penalty=float(body.presence_penalty or 0.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            repetition_penalty=1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
            logit_bias=body.logit_bias,
            allowed_ids=tuple(dict.fromkeys(body.allowed_token_ids)),
            seed=(seed if body.seed is None else body.seed) & _SEED_MASK,
            choice=choice,
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            min_tokens=min(body.min_tokens or 0, max_tokens),
            logprobs=top,
            prompt_logprobs=None if choice else of_prompt,
            bad_words=bad_words,
            logprob_ids=body.logprob_token_ids,
        )
        for choice in range(n)
    )
