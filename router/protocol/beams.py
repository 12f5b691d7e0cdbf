"""Beam search in a body: how wide, and what has no say in it and is refused beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from router.protocol.validation import Refused
from workers.api.request import MAX_BEAMS, BeamParams

DEFAULT_LENGTH_PENALTY = 1.0
# Fields that change which tokens are likely, stop at text, or name tokens: the search knows the likeliest ones, as the
# model has them.
_NO_SAY = (
    ("presence_penalty", 0),
    ("frequency_penalty", 0),
    ("repetition_penalty", 1),
    ("logit_bias", ()),
    ("allowed_token_ids", ()),
    ("bad_words", ()),
    ("stop", ()),
    ("logprob_token_ids", ()),
)


def asked_beams(body: Any) -> BeamParams | None:
    """The search that a body asks for, if any."""
    if not body.use_beam_search:
        return None
    penalty = body.length_penalty
    return BeamParams(body.asked_choices, DEFAULT_LENGTH_PENALTY if penalty is None else float(penalty))


def check_beams(body: Any) -> None:
    """Raises Refused where a body asks for a search beside what excludes one, or for a `length_penalty` without."""
    if not body.use_beam_search:
        if body.length_penalty not in (None, DEFAULT_LENGTH_PENALTY):
            raise Refused("The '{param}' parameter is only allowed with 'use_beam_search'.", at=("length_penalty",))
        return
    if body.temperature:
        raise Refused("Invalid '{param}': a beam search draws nothing; leave it out, or say 0.", at=("temperature",))
    for name in _given(body):
        raise Refused("'{param}' and 'use_beam_search' exclude each other.", at=(name,))
    if body.asked_grammar is not None:
        raise Refused("'{param}' and structured output exclude each other.", at=("use_beam_search",))
    if body.asked_choices > MAX_BEAMS:
        name = "n" if body.n == body.asked_choices else "best_of"
        raise Refused(
            f"Invalid '{{param}}': a beam search has at most {MAX_BEAMS} beams, but got {body.asked_choices} instead.",
            code="integer_above_max_value",
            at=(name,),
        )


def _given(body: Any) -> Iterable[str]:
    for name, nothing in _NO_SAY:
        value = getattr(body, name)
        if value is not None and value != nothing:
            yield name
