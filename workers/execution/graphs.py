"""CUDA graphs of whole steps: model, greedy draw, write to the token table.

One graph a shape, captured at start-up from the greatest to the least, so that all share the greatest one's memory.
Decodes alone have shapes of their own, with more programs for long caches; any other step of few tokens is of a mixed
shape. A step of more tokens is launched kernel by kernel: the device is then busy for longer than the host.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence

import torch

from workers.context import LayerCache
from workers.execution.flat import FlatStep
from workers.execution.inputs import BatchState
from workers.execution.padded import PaddedInputs, PaddedStep, StepShape
from workers.models.base import CausalModel

MOST_TOKENS = 1024  # of a captured step

log = logging.getLogger("echelon.graphs")


def sizes(most: int) -> list[int]:
    """The numbers of tokens up to `most` that steps are padded to, the further apart the less a row more costs."""
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, most, 32)]
    return [size for size in ladder if size < most] + [most]


class CapturedStep:
    """A padded step and its graph."""

    def __init__(self, step: PaddedStep, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self.step, self._graph = step, torch.cuda.CUDAGraph()
        step.inputs.clear()
        step.run()  # compiles kernels and makes workspaces, which a capture cannot
        stream.synchronize()
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step.run()
        finally:
            self._graph.capture_end()

    def replay(self, flat: FlatStep) -> None:
        """Queue a step that fits."""
        self.step.inputs.fill(flat)
        self._graph.replay()


class StepGraphs:
    """The captured steps of one runner, by shape. `limit`: tokens of the longest step that may come."""

    def __init__(self, model: CausalModel, caches: Sequence[LayerCache], state: BatchState, limit: int) -> None:
        self._model, self._caches, self._state = model, caches, state
        self._decode_sizes = sizes(state.max_num_seqs)
        self._mixed_sizes = [n for n in sizes(min(limit, MOST_TOKENS)) if n >= 16 or n == limit]
        self._decode: list[CapturedStep] = []
        self._mixed: list[CapturedStep] = []

    def capture(self) -> None:
        """Capture every shape. Nobody else may use the device meanwhile."""
        began, device = time.perf_counter(), self._state.device
        decode = [StepShape.decode(n) for n in self._decode_sizes]
        mixed = [StepShape.mixed(n, self._state.max_num_seqs) for n in self._mixed_sizes]
        needed = max(PaddedInputs.bytes_needed(shape) for shape in (*decode, *mixed))
        buffer = torch.empty(needed, dtype=torch.uint8, device=device)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for shapes, captured in ((mixed, self._mixed), (decode, self._decode)):
                for shape in reversed(shapes):
                    step = PaddedStep(self._model, self._caches, self._state, shape, buffer)
                    captured.insert(0, CapturedStep(step, pool, stream))
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.empty_cache()  # what the runs before the captures took
        log.info("%d graphs captured in %.2f s", len(decode) + len(mixed), time.perf_counter() - began)

    def find(self, flat: FlatStep) -> CapturedStep | None:
        """The least captured step that `flat` fits, if there is one."""
        alone = flat.decodes == flat.num_tokens == len(flat.emit_at)
        fitting, captured = (self._decode_sizes, self._decode) if alone else (self._mixed_sizes, self._mixed)
        at = bisect_left(fitting, flat.num_tokens)
        return captured[at] if at < len(captured) else None
