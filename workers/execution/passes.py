"""Passes: a step, or a part of one, through the model to its drawn tokens.

A pass for which there is no memory, anywhere in it, fails on all ranks of its group and may be made again in parts: who
has none goes on to all of its collectives with what lies in its reserve, and after the draws the ranks tell each other.
A pass that is a captured one as a whole takes no memory, so nobody asks.

Shapes: T tokens, E emitting rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.context import ForwardContext, LayerCache, forward_context
from workers.engine.plan import StepMasks
from workers.execution.flat import FlatStep
from workers.execution.graphs import CapturedStep, StepGraphs
from workers.execution.halving import is_out_of_memory
from workers.execution.inputs import BatchState
from workers.execution.prompt_scores import pieces_of, score_prompts
from workers.execution.sampler import Logprobs, Sampled, sample_own
from workers.execution.sampling_state import GREEDY, PromptRows
from workers.execution.under_way import Begun, Part, Undrawn
from workers.models.base import CausalModel
from workers.parallel import attendance
from workers.parallel.attendance import Piece
from workers.parallel.group import Group


class Passes:
    """The passes of one rank. `graphs`: captured ones that are taken where they fit.

    `collect`: whether what was drawn is brought to the host. `careful`: whether one without memory is let off; with
    several ranks that needs the group's `attendance`.
    """

    def __init__(
        self,
        model: CausalModel,
        caches: Sequence[LayerCache],
        state: BatchState,
        group: Group,
        *,
        collect: bool,
        careful: bool,
    ) -> None:
        self.model, self.caches, self.state, self.group = model, tuple(caches), state, group
        self.collect, self.careful = collect, careful
        self.graphs: StepGraphs | None = None

    def begin(self, flat: FlatStep, rows: Sequence[PromptRows]) -> Begun:
        """Queue a pass until its draws; log-probabilities of prompts are wanted at `rows`."""
        captured = None if self.graphs is None or rows else self.graphs.find(flat)
        begun = Begun(flat, rows, captured is not None)
        members = self._members if captured is None else None
        if members is not None:
            members.begin()
        lenient = self.careful and (captured is None or self.group.size == 1)
        try:
            begun.undrawn = self._forward(flat, rows) if captured is None else self._replay(captured, flat)
        except Exception as e:
            if not (lenient and is_out_of_memory(e)):
                raise
            begun.why = str(e)
        # Not in the handler: the error holds on to the frames in which the pass's tensors are.
        if begun.why is not None and members is not None:
            members.complete(self._pieces(flat, rows), self.group)
        return begun

    def end(self, begun: Begun, masks: StepMasks | None) -> Part | None:
        """Queue its draws, and their way to the host; None where there is no memory here. `failed` comes next."""
        greedy = self.group.size > 1 and masks is None and self.state.sampling.plain(begun.flat.emit_slots)
        sure = begun.captured and greedy
        members = None if sure else self._members
        if members is not None:
            members.begin()
        part = None
        if begun.undrawn is not None:
            try:
                part = self._draw(begun.undrawn, masks)
            except Exception as e:
                if not (self.careful and not sure and is_out_of_memory(e)):
                    raise
                begun.why = str(e)
            begun.undrawn = None
        if members is not None:
            if begun.why is not None:
                emits = len(begun.flat.emit_at)
                name = attendance.GREEDY if greedy else attendance.GATHER
                members.complete([(name, emits)] if emits else [], self.group)
            begun.outcome = self.group.vote(says=begun.why is not None)
        return part

    @staticmethod
    def failed(begun: Begun) -> bool:
        """Whether a rank had no memory for the pass, and `begun.why`; waits until all ranks have come to its end."""
        without = begun.outcome() if begun.outcome is not None else ()
        if without and begun.why is None:
            begun.why = f"there is none on rank {', '.join(map(str, without))}"
        return begun.why is not None

    @property
    def _members(self) -> attendance.Attendance | None:
        return self.group.attendance if self.careful else None

    def _pieces(self, flat: FlatStep, rows: Sequence[PromptRows]) -> list[Piece]:
        """What `_forward` is made of."""
        pieces = [(attendance.BODY, flat.num_tokens)]
        for count in pieces_of(rows):
            pieces += [(attendance.HEAD, count), (attendance.GATHER, count)]
        if len(flat.emit_at):
            pieces.append((attendance.HEAD, len(flat.emit_at)))
        return pieces

    def _forward(self, flat: FlatStep, rows: Sequence[PromptRows]) -> Undrawn:
        inputs = self.state.upload(flat)
        context = ForwardContext((inputs.attention,) * len(self.caches), self.caches)
        table, logits_of = self.state.token_table, self.model.compute_logits
        undrawn = Undrawn(tuple(flat.emit_slots.tolist()), inputs.sampling, emit_at=inputs.emit_at)
        with forward_context(context):
            hidden = self.model(inputs.input_ids, inputs.positions)
            if rows:
                undrawn.prompts = score_prompts(hidden, rows, table, logits_of, self._bring)
            if len(inputs.emit_at):
                if inputs.emit_index is not None:
                    hidden = hidden.index_select(0, inputs.emit_index)
                undrawn.logits = self.model.own_logits(hidden)
        return undrawn

    def _replay(self, captured: CapturedStep, flat: FlatStep) -> Undrawn:
        """The captured draw is greedy. Where more is asked for, its tokens are replaced before anything reads them."""
        undrawn = Undrawn(tuple(flat.emit_slots.tolist()), self.state.upload_changes(flat))
        captured.replay(flat)
        emits, step = len(flat.emit_at), captured.step
        if emits and undrawn.sampling is GREEDY:
            undrawn.sampled = Sampled(step.tokens[:emits])
        elif emits:
            undrawn.logits, undrawn.emit_at = step.own_logits[:emits], step.inputs.on_device["emit_at"][:emits]
        return undrawn

    def _draw(self, undrawn: Undrawn, masks: StepMasks | None) -> Part:
        sampled, sampling = undrawn.sampled, undrawn.sampling
        if undrawn.logits is not None and undrawn.emit_at is not None:
            if masks is not None:
                sampling = self.state.masked(sampling, undrawn.emit_slots, masks)
            sampled = sample_own(self.model, undrawn.logits, sampling, self.state.token_table)
            self.state.write_tokens(undrawn.emit_at, sampled.tokens)
        prompts = undrawn.prompts if self.collect else ()
        if sampled is None or not self.collect:
            return Part((), None, None, prompts)
        return Part(undrawn.emit_slots, sampling.logprobs, self._to_host(sampled), prompts)

    def _to_host(self, sampled: Sampled) -> Sampled:
        if self.state.device.type == "cpu":
            return sampled
        extra, bring = sampled.logprobs, self._bring
        if extra is None:
            return Sampled(bring(sampled.tokens))
        named = None if extra.named is None else bring(extra.named)
        chosen, rank, top, top_ids = map(bring, (extra.chosen, extra.rank, extra.top, extra.top_ids))
        return Sampled(bring(sampled.tokens), Logprobs(chosen, rank, top, top_ids, named))

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy to the host, under way; on the CPU the tensor itself."""
        if self.state.device.type == "cpu":
            return tensor
        host = self.state.host.lend(tensor.numel(), tensor.dtype)
        return host.view(tensor.shape).copy_(tensor, non_blocking=True)
