"""What collectives a model's passes have, learned from a few short ones at the start: see `Attendance`."""

from __future__ import annotations

from functools import partial

import torch

from workers.api.request import SamplingParams
from workers.context import ForwardContext, forward_context
from workers.engine.plan import NewSequence, ScheduledSequence, StepPlan
from workers.execution.passes import Passes
from workers.execution.prompt_scores import SCORED_ROWS
from workers.parallel.attendance import BODY, GATHER, GREEDY, HEAD, LEARNED_FROM, Attendance

LONGEST = max(LEARNED_FROM)  # tokens that the passes' state and caches must hold
_PLAIN = SamplingParams(max_tokens=1, temperature=0.0)


@torch.inference_mode()
def rehearse(passes: Passes, attendance: Attendance, most_tokens: int, most_rows: int) -> int | str:
    """The ranks' `attendance`, of all at once, can complete a pass of up to so many tokens and rows of logits; returns
    the bytes that are set aside for it, or why it cannot.
    """
    state, model = passes.state, passes.model
    blocks = tuple(range(-(-LONGEST // state.block_size)))
    for rows in LEARNED_FROM:
        new = NewSequence(0, (0,) * rows, rows, _PLAIN, blocks)
        inputs = state.prepare(StepPlan(0, (0,), (new,), (ScheduledSequence(0, 0, rows, 1),)))
        with forward_context(ForwardContext((inputs.attention,) * len(passes.caches), passes.caches)):
            hidden = attendance.learn(BODY, rows, partial(model, inputs.input_ids, inputs.positions))
            own = attendance.learn(HEAD, rows, partial(model.own_logits, hidden))
            attendance.learn(GATHER, rows, partial(model.gather_logits, own))
            attendance.learn(GREEDY, rows, partial(model.greedy_tokens, own))
    why = attendance.conclude()
    if why is not None:
        return why
    rows = max(most_rows, SCORED_ROWS)
    most = [(BODY, most_tokens), *((name, rows) for name in (HEAD, GATHER, GREEDY))]
    return attendance.reserve(most, passes.group, state.device)
