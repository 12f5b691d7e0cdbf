"""CUDA graphs of whole steps: model, greedy draw, write to the token table.

One graph a shape that pays, captured at start-up from the greatest to the least, so that all share the greatest one's
memory. Decodes alone have shapes of their own, with more programs for long caches; any other step of few tokens is of a
mixed shape. A step of more tokens is launched kernel by kernel: the device is then busy for longer than the host.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from kernels.invariant_linear import padded_cost
from kernels.tuning import table_of
from workers.context import LayerCache
from workers.execution.flat import FlatStep
from workers.execution.inputs import BatchState
from workers.execution.padded import PaddedInputs, PaddedStep, StepShape
from workers.layers.embedding import ParallelLMHead
from workers.layers.linear import ParallelLinear
from workers.models.base import CausalModel
from workers.parallel.group import Group

MOST_TOKENS = 1024  # of a captured step
# How far apart shapes are: a row more costs little while the weights' reading is what takes the time, more from 256 on.
_DECODE_STEPS = {256: 8, MOST_TOKENS: 16}
_MIXED_STEPS = {512: 16, MOST_TOKENS: 32}
_WARM_TOKENS = 64  # up to here launches differ in more than their size

log = logging.getLogger("echelon.graphs")


def sizes(most: int, steps: dict[int, int]) -> list[int]:
    """Numbers of tokens up to `most` that steps are padded to. `steps`: how far they are apart, up to which number."""
    ladder, at = [1, 2, 4, 8], 8
    for until, step in steps.items():
        ladder += range(at - at % step + step, until + 1, step)
        at = until
    return [size for size in ladder if size < most] + [most]


def worth_capturing(ladder: list[int], cost: Callable[[int], float | None]) -> list[int]:
    """`ladder` without the sizes for which a greater one costs no more; those of unknown cost stay."""
    kept: list[int] = []
    least = float("inf")
    for size in reversed(ladder):
        found = cost(size)
        if found is None or found < least:
            kept.append(size)
            least = least if found is None else found
    return kept[::-1]


def kept_by_any(ladder: list[int], kept: list[int], group: Group, device: torch.device) -> list[int]:
    """The sizes of `ladder` that some rank keeps: devices of several kinds have several tables."""
    flags = group.agree([int(size in kept) for size in ladder], device)
    return [size for size, *said in zip(ladder, *flags, strict=True) if any(said)]


def _products_of(model: CausalModel, device: torch.device) -> Callable[[int], float | None]:
    """Microseconds that the linears of `model` take for so many tokens, where the device's table says so."""
    weights = [m.weight for m in model.modules() if isinstance(m, (ParallelLinear, ParallelLMHead))]
    shapes = [(w.shape[0], w.shape[1]) for w in weights if isinstance(w, torch.Tensor) and w.element_size() == 2]
    if len(shapes) < len(weights):
        return lambda tokens: None
    return partial(table_of(device).product_microseconds, shapes)


class CapturedStep:
    """A padded step and its graph. `warm`: it has launches that nobody made before, so it runs once ahead of that."""

    def __init__(self, step: PaddedStep, pool: Any, stream: torch.cuda.Stream, *, warm: bool) -> None:
        self.step, self._graph = step, torch.cuda.CUDAGraph()
        if warm:
            step.inputs.clear()
            step.run()
            stream.synchronize()
        # Relaxed: a kernel that is still compiled here is also loaded.
        self._graph.capture_begin(pool=pool, capture_error_mode="relaxed")
        try:
            step.run()
        finally:
            self._graph.capture_end()

    def replay(self, flat: FlatStep) -> None:
        """Queue a step that fits."""
        self.step.inputs.fill(flat)
        self._graph.replay()


class StepGraphs:
    """The captured steps of one runner, by shape. `limit`: tokens of the longest step that may come.

    All ranks of `group` make and capture the same ones in the same order: collectives meet in them.
    """

    def __init__(
        self, model: CausalModel, caches: Sequence[LayerCache], state: BatchState, limit: int, group: Group
    ) -> None:
        self._model, self._caches, self._state = model, caches, state
        seqs, most = state.max_num_seqs, min(limit, MOST_TOKENS)
        cost = padded_cost if state.batch_invariant else _products_of(model, state.device)

        def chosen(ladder: list[int]) -> list[int]:
            return kept_by_any(ladder, worth_capturing(ladder, cost), group, state.device)

        decodes = chosen(sizes(min(seqs, MOST_TOKENS), _DECODE_STEPS))
        mixed = chosen([n for n in sizes(most, _MIXED_STEPS) if n >= 16 or n == most])
        self.decode_shapes = [StepShape.decode(n) for n in decodes]
        self.mixed_shapes = [StepShape.mixed(n, seqs) for n in mixed]
        self._captured: dict[StepShape, CapturedStep] = {}

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Capture every shape, and tell how many of how many are. Nobody else may use the device meanwhile."""
        began, device = time.perf_counter(), self._state.device
        shapes = [*self.decode_shapes, *self.mixed_shapes]
        needed = max(PaddedInputs.bytes_needed(shape) for shape in shapes)
        buffer = torch.empty(needed, dtype=torch.uint8, device=device)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for shape in reversed(shapes):
                step = PaddedStep(self._model, self._caches, self._state, shape, buffer)
                warm = shape.tokens <= _WARM_TOKENS or not self._captured
                self._captured[shape] = CapturedStep(step, pool, stream, warm=warm)
                progress(len(self._captured), len(shapes))
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.empty_cache()  # what the runs before the captures took
        log.info("%d graphs captured in %.2f s", len(shapes), time.perf_counter() - began)

    def shape_for(self, flat: FlatStep) -> StepShape | None:
        """The least shape that holds `flat`, if there is one."""
        alone = flat.decodes == flat.num_tokens == len(flat.emit_at)
        shapes = self.decode_shapes if alone else self.mixed_shapes
        first = bisect_left(shapes, flat.num_tokens, key=lambda shape: shape.tokens)
        return next((shape for shape in shapes[first:] if shape.holds(flat)), None)

    def find(self, flat: FlatStep) -> CapturedStep | None:
        """The captured step to run `flat` in, if there is one."""
        shape = self.shape_for(flat)
        return None if shape is None else self._captured[shape]
