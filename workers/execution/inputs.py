"""The batch by slot, and the inputs of a step: flattened tokens without padding.

A decode's input token is read from the token table on the device, where the sampler wrote it: a step can be prepared
before the host has seen the one before it. The host keeps what it decides itself (block tables, sampling parameters)
and sends changes.

Shapes: T tokens, B sequences, E emitting rows, S block size, M blocks a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from kernels.dense_prefill import DensePrompts, calls_of, is_dense
from kernels.paged_decode import ORDERED_FROM, longest_first
from workers.api.errors import EngineFault
from workers.context import AttentionMetadata, DecodeBatch, PrefillBatch
from workers.engine.plan import ScheduledSequence, StepMasks, StepPlan
from workers.execution.flat import Changes, FlatStep, flatten
from workers.execution.halving import independent_order
from workers.execution.pinned import HostBuffers
from workers.execution.sampling_state import Finish, Masks, SamplingBatch, SamplingState
from workers.execution.upload import Array, Uploader


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the device.

    input_ids [T] int32, positions [T] int64. `emit_index` [E] int64 are the tokens after which one is drawn (None: all
    of them in order), `emit_at` [E] int64 the places of the drawn tokens in the flat token table.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    emit_index: torch.Tensor | None
    emit_at: torch.Tensor
    sampling: SamplingBatch


class _Upload:
    """The arrays of one step's upload."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    def give(self, array: Array) -> int:
        """Adds an array; returns its place."""
        self.arrays.append(array)
        return len(self.arrays) - 1


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The sequences of several query tokens as attention gets them: see `PrefillBatch`."""

    seqs: Array
    lens: Array
    cu_query: Array
    dense: tuple[DensePrompts, ...]
    max_query: int

    @property
    def padding(self) -> int:
        """How many tokens behind the step's the dense prompts read."""
        end = int(self.cu_query[-1])
        return max([0, *(call.first + call.rows - end for call in self.dense)])

    @staticmethod
    def of(flat: FlatStep, *, dense: bool) -> _Pieces:
        """With `dense` long prompts with nothing cached are not pieces of the paged attention."""
        query, lens = flat.query, flat.lens[flat.decodes :].astype(np.int32)
        cu_query = np.concatenate(([0], np.cumsum(query))).astype(np.int32)
        calls: tuple[DensePrompts, ...] = ()
        if dense:
            whole = [is_dense(*both) for both in zip(query.tolist(), lens.tolist(), strict=True)]
            if any(whole):
                calls = calls_of(zip(cu_query[:-1][whole].tolist(), query[whole].tolist(), strict=True))
                query, lens = np.where(whole, 0, query), np.where(whole, 0, lens)
        return _Pieces(flat.seqs[flat.decodes :], lens, cu_query, calls, int(query.max()))


class BatchState:
    """Tokens, block tables and sampling parameters of the sequences, by slot; updated by plans."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        batch_invariant: bool = False,
        by_length: bool = False,
    ) -> None:
        self.block_size, self.device, self.batch_invariant = block_size, device, batch_invariant
        self.width = max_model_len + 1  # the last token drawn may stand just behind the context
        self.max_blocks = -(-self.width // block_size)
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.dense_prompts = False  # whether long prompts go to `dense_prefill`
        self.sampling = SamplingState(max_num_seqs, vocab_size)
        self.host = HostBuffers(pinned=device.type == "cuda")
        self._uploader = Uploader(device, self.host)
        rows = max_num_seqs + 1  # the last row is nobody's: padding reads and writes there
        self._tables = np.zeros((rows, self.max_blocks), np.int32)
        self._held = [0] * max_num_seqs
        self.prompts = np.zeros(rows, np.int64) if by_length else None
        self._shared = device.type == "cpu"
        if self._shared:
            self._tokens = np.zeros((rows, self.width), np.int32)
            self.token_table = torch.from_numpy(self._tokens)
            self.block_table = torch.from_numpy(self._tables)
        else:
            self.token_table = torch.zeros((rows, self.width), dtype=torch.int32, device=device)
            self.block_table = torch.zeros((rows, self.max_blocks), dtype=torch.int32, device=device)
        self.flat_tokens = self.token_table.view(-1)

    def write_tokens(self, at: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put drawn tokens [E] int64 at the places `at` [E]; a fault is written as token 0."""
        self.flat_tokens.index_copy_(0, at, tokens.clamp(min=0).to(torch.int32))

    def prepare(self, plan: StepPlan) -> StepInputs:
        """Apply the plan's changes and build its step. Raises EngineFault on a plan that cannot be run."""
        return self.upload(self.flatten(plan))

    def flatten(self, plan: StepPlan) -> FlatStep:
        """Apply the plan's changes on the host. Raises EngineFault on a plan that cannot be run."""
        if not plan.scheduled:
            raise EngineFault(f"the plan of step {plan.step} schedules nothing")
        changes = self._apply(plan)
        return self._flatten(plan, changes)

    def _flatten(self, plan: StepPlan, changes: Changes | None) -> FlatStep:
        size, width = self.block_size, self.width
        return flatten(plan, self._tables, block_size=size, width=width, changes=changes, prompts=self.prompts)

    def flatten_again(self, step: int, scheduled: tuple[ScheduledSequence, ...]) -> FlatStep:
        """Some of a step whose changes `flatten` and `change_again` have made."""
        return self._flatten(StepPlan(step, (), (), scheduled), None)

    def change_again(self, flat: FlatStep) -> None:
        """Make the changes of a step, of which it is not known whether they reached the device."""
        if flat.changes is not None:
            self._change(*self._uploader.upload(flat.changes))

    def block_copies(self, plan: StepPlan) -> list[tuple[int, int]]:
        """What of which block is copied to which other one for a plan that has not been applied yet."""
        return [
            (int(self._tables[one.source, one.position // self.block_size]),
             int(self._tables[one.slot, one.position // self.block_size]))
            for one in plan.continued
            if one.source != one.slot and one.position % self.block_size
        ]  # fmt: skip

    def order(self, plan: StepPlan) -> list[ScheduledSequence]:
        """What the plan runs, in an order in which it may be run in parts."""
        return independent_order(plan.scheduled, self._tables, self.block_size)

    def places(self, run: ScheduledSequence) -> torch.Tensor:
        """The slots [count] int64 of the KV cache that `run` writes, on the device."""
        positions = np.arange(run.start, run.start + run.count)
        blocks = self._tables[run.slot, positions // self.block_size].astype(np.int64)
        return torch.from_numpy(blocks * self.block_size + positions % self.block_size).to(self.device)

    def upload(self, flat: FlatStep) -> StepInputs:
        """The step on the device, without padding."""
        upload, decodes = _Upload(), flat.decodes
        changes = self._give_changes(flat, upload)
        token_at, position, slots = map(upload.give, (flat.token_at, flat.positions, flat.slots))
        rows = None
        decode_seqs, decode_lens = flat.seqs[:decodes], flat.lens[:decodes].astype(np.int32)
        if decodes >= ORDERED_FROM and not self._shared:
            order = longest_first(decode_lens)
            decode_seqs, decode_lens, rows = decode_seqs[order], decode_lens[order], upload.give(order.astype(np.int32))
        seqs, lens = upload.give(decode_seqs), upload.give(decode_lens)
        pieces = _Pieces.of(flat, dense=self.dense_prompts) if len(flat.query) else None
        if pieces is not None:
            piece_seqs, piece_lens, cu_query = map(upload.give, (pieces.seqs, pieces.lens, pieces.cu_query))
        emit_index = None if flat.emit_index is None else upload.give(flat.emit_index)
        emit_at = upload.give(flat.emit_at)
        lengths = None if flat.lengths is None else upload.give(flat.lengths)
        finish = self._select(flat, upload)

        t = self._uploader.upload(upload.arrays)
        if changes is not None:
            self._change(*(t[i] for i in changes))
        span = -(-int(flat.lens.max()) // self.block_size)
        decode = prefill = None
        if decodes:
            # On a GPU the bound that graphs have, so that the same kernels are launched.
            longest = int(flat.lens[:decodes].max()) if self._shared else self.max_model_len
            tables = self.block_table[:, :span].index_select(0, t[seqs])
            decode = DecodeBatch(tables, t[lens], longest, None if rows is None else t[rows])
        if pieces is not None:
            dense_slots = None
            if pieces.dense:  # behind the step's tokens its last one, again and again
                dense_slots = F.pad(t[slots], (0, pieces.padding), value=int(flat.slots[-1]))
            prefill = PrefillBatch(
                self.block_table[:, :span].index_select(0, t[piece_seqs]), t[piece_lens], t[cu_query],
                max(pieces.max_query, 1), int(flat.lens[decodes:].max()), first=decodes, dense=pieces.dense,
                dense_slots=dense_slots, rest=pieces.max_query > 0,
            )  # fmt: skip
        return StepInputs(
            input_ids=self.flat_tokens.index_select(0, t[token_at]),
            positions=t[position],
            attention=AttentionMetadata(
                t[slots],
                decodes,
                decode,
                prefill,
                self.batch_invariant,
                lengths=None if lengths is None else t[lengths],
            ),
            emit_index=None if emit_index is None else t[emit_index],
            emit_at=t[emit_at],
            sampling=finish(t),
        )

    def upload_changes(self, flat: FlatStep) -> SamplingBatch:
        """What of a step a captured one does not take in itself: changes of the tables, and sampling parameters."""
        upload = _Upload()
        changes, finish = self._give_changes(flat, upload), self._select(flat, upload)
        t = self._uploader.upload(upload.arrays) if upload.arrays else []
        if changes is not None:
            self._change(*(t[i] for i in changes))
        return finish(t)

    def masked(self, batch: SamplingBatch, emit_slots: Sequence[int], masks: StepMasks) -> SamplingBatch:
        """`batch` with the masks of those that draw. They have a copy to the device of their own: the step's upload,
        whose memory the next one takes, is still in use.
        """
        place = {slot: n for n, slot in enumerate(masks.slots)}
        rows = [row for row, slot in enumerate(emit_slots) if slot in place]
        words = len(masks.bits) // (4 * len(masks.slots))
        bits = np.frombuffer(masks.bits, np.int32).reshape(-1, words)
        rows_bytes = 8 * len(rows)
        staging = self.host.lend(rows_bytes + 4 * words * len(rows))
        host = staging.numpy()
        host[:rows_bytes].view(np.int64)[:] = rows
        order = [place[emit_slots[row]] for row in rows]
        np.take(bits, order, axis=0, out=host[rows_bytes:].view(np.int32).reshape(-1, words), mode="clip")
        sent = staging.to(self.device, non_blocking=True)
        return replace(
            batch, masks=Masks(sent[:rows_bytes].view(torch.int64), sent[rows_bytes:].view(torch.int32).view(-1, words))
        )

    def _select(self, flat: FlatStep, upload: _Upload) -> Finish:
        return self.sampling.select(flat.emit_slots, flat.drawn_at, upload.give)

    def _give_changes(self, flat: FlatStep, upload: _Upload) -> list[int] | None:
        return None if flat.changes is None else [upload.give(array) for array in flat.changes]

    def _apply(self, plan: StepPlan) -> Changes | None:
        """Changes on the host; on CUDA the device's tables need the returned ones too."""
        tokens: list[tuple[int, tuple[int, ...]]] = []
        blocks: list[tuple[int, Sequence[int] | Array]] = []
        for one in plan.continued:
            tokens.append((one.slot * self.width + one.position, (one.token_id,)))
            if one.source != one.slot:
                shared = self._tables[one.source, : one.position // self.block_size].copy()
                self._tables[one.slot, : len(shared)] = shared
                blocks.append((one.slot * self.max_blocks, shared))
        for slot in plan.removed:
            self._held[slot] = 0
        for new in plan.added:
            if len(new.token_ids) >= self.width:
                raise EngineFault(f"a sequence of {len(new.token_ids)} tokens is over the context of {self.width - 1}")
            self._held[new.slot] = 0
            if self.prompts is not None:
                self.prompts[new.slot] = new.num_prompt
            self.sampling.add(new.slot, new.sampling, new.num_prompt, len(new.token_ids), masked=new.masked)
            tokens.append((new.slot * self.width, new.token_ids))
            if new.blocks:
                blocks.append((self._append(new.slot, new.blocks), new.blocks))
        for s in plan.scheduled:
            if s.new_blocks:
                blocks.append((self._append(s.slot, s.new_blocks), s.new_blocks))
        if self._shared:
            flat = self._tokens.reshape(-1)
            for at, ids in tokens:
                flat[at : at + len(ids)] = ids
            return None
        if not tokens and not blocks:
            return None
        return (*_pairs(tokens), *_pairs(blocks))

    def _append(self, slot: int, blocks: tuple[int, ...]) -> int:
        """Append to a slot's block table; returns the flat place of the first."""
        held = self._held[slot]
        if held + len(blocks) > self.max_blocks:
            raise EngineFault(f"slot {slot} would hold {held + len(blocks)} blocks of at most {self.max_blocks}")
        self._tables[slot, held : held + len(blocks)] = blocks
        self._held[slot] = held + len(blocks)
        return slot * self.max_blocks + held

    def _change(
        self, token_at: torch.Tensor, token_ids: torch.Tensor, block_at: torch.Tensor, block_ids: torch.Tensor
    ) -> None:
        self.flat_tokens.index_copy_(0, token_at, token_ids)
        self.block_table.view(-1).index_copy_(0, block_at, block_ids)


def _pairs(runs: Sequence[tuple[int, Sequence[int] | Array]]) -> tuple[Array, Array]:
    """Flat places int64 and values int32 of runs that begin at the given places."""
    if not runs:
        return np.zeros(0, np.int64), np.zeros(0, np.int32)
    at = np.concatenate([np.arange(start, start + len(values)) for start, values in runs])
    return at, np.concatenate([np.array(values, np.int32) for _, values in runs])
