"""The numbers of many replicas side by side, so that one decision looks at all of them at once.

Only for replicas of one shape. It comes to what the loops over `Replica` come to, to the last bit. Only dispatchers of
many replicas load this, and numpy with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.dispatch.table import Demand, Replica

_WAIT, _TOKEN, _STEP, _SEQ, _KV, _ENDS, _SLOTS, _FREE_SLOTS, _FREE_BLOCKS = range(9)


class Columns:
    """One column for each of `replicas`; those in `changed` are read anew before the next decision."""

    def __init__(self, replicas: Sequence[Replica], changed: set[Replica]) -> None:
        self._replicas, self._changed = list(replicas), changed
        self._place = {replica: i for i, replica in enumerate(replicas)}
        self._num_blocks = replicas[0].info.num_blocks
        self._rows: NDArray[np.float64] = np.zeros((9, len(replicas)))
        changed.update(replicas)

    def free(self, choices: int, blocks: int) -> NDArray[np.bool_]:
        """Who has so many slots and blocks free; an empty one has blocks enough."""
        self._read()
        free_blocks = self._rows[_FREE_BLOCKS]
        enough: NDArray[np.bool_] = (free_blocks >= blocks) | (free_blocks == self._num_blocks)
        enough &= self._rows[_FREE_SLOTS] >= choices
        return enough

    def those(self, chosen: NDArray[np.bool_]) -> list[Replica]:
        """The replicas themselves, in order."""
        return [self._replicas[i] for i in np.flatnonzero(chosen).tolist()]

    def least_expected(self, among: NDArray[np.bool_], demand: Demand) -> Replica:
        """`MinExpectedLatency.choose` of those in `among`, which are some."""
        rows = self._rows
        own: int | NDArray[np.int64] = demand.prefill
        if demand.prompt is not None:
            own = np.fromiter((r.uncached(demand) for r in self._replicas), np.int64, len(self._replicas))
        outputs = rows[_SEQ] * demand.choices
        outputs += rows[_STEP]
        outputs += rows[_KV] * demand.prefill
        outputs *= demand.output
        seconds = rows[_TOKEN] * own
        seconds += rows[_WAIT]
        seconds += outputs
        seconds += np.maximum(rows[_ENDS] - demand.at, 0.0)
        seconds[~among] = np.inf
        least = np.flatnonzero((seconds == seconds.min()) & among)
        if len(least) > 1:
            least = least[np.argsort(rows[_SLOTS, least], kind="stable")]
        return self._replicas[int(least[0])]

    def _read(self) -> None:
        rows, place = self._rows, self._place
        for r in self._changed:
            i = place.get(r)
            if i is None:
                continue  # it was removed
            rows[:, i] = (
                r.lag + r.queue_seconds,
                r.token_seconds,
                r.step_seconds,
                r.seq_seconds,
                r.kv_seconds,
                r.step_ends,
                r.slots,
                r.free_slots,
                r.free_blocks,
            )
        self._changed.clear()
