"""The entries of a tuning table, the most wanted first, and what is tried for each, the most promising first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tuning_cases import Arena, Case, HeadShape, decode_case, gemv_case, prefill_case

from kernels.tuning import (
    DecodeTuning,
    GemvTuning,
    PrefillTuning,
    default_decode,
    default_gemv,
    default_prefill,
)

BITS = 16
# Of one rank. The first is what the goals are about.
SHAPES = {
    "Llama-3.1-8B": HeadShape(32, 8, 128),
    "Llama-3.1-70B at tp 8": HeadShape(8, 1, 128),
    "Qwen-2.5-7B": HeadShape(28, 4, 128),
    "Llama-3.2-1B": HeadShape(32, 8, 64),
    "Llama-2-7B": HeadShape(32, 32, 128),
}
# Of the 8B: qkv, output, gate-up, down and head, whole and as tp 2 cuts them.
WEIGHTS = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    *((3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168), (64128, 4096)),
)
MOST_SEQUENCES = 1024
# Programs of a decode without splits: from where (the entry before ends there), and how many are timed.
DECODE_STEPS = ((0, 8), (16, 32), (64, 128), (256, 384), (512, 768), (1024, 1536), (2048, 3072))
# Most query tokens of a sequence: from where, and the cases: prompts, tokens, tokens behind, bound.
PREFILL_STEPS = (
    (0, ((16, 48, 512, 0), (64, 16, 200, 64))),
    (65, ((37, 220, 0, 0), (8, 200, 800, 0))),
    (257, ((8, 1000, 0, 0), (4, 200, 0, 1024))),
    (1025, ((1, 8000, 0, 0), (4, 2048, 0, 0))),
)
FEW = (
    *(DecodeTuning(64, 4, 3, True, 1, 8), DecodeTuning(64, 4, 2, False, 1), DecodeTuning(32, 4, 3, True)),
    *(DecodeTuning(128, 8, 2, False, 1), DecodeTuning(64, 8, 3, True), DecodeTuning(64, 4, 3, False, 1, 16)),
    *(DecodeTuning(64, 4, 3, True, 1, 4), DecodeTuning(64, 4, 3, True, 2, 16), DecodeTuning(32, 2, 3, True)),
)
MANY = (
    *(DecodeTuning(64, 4, 2, False, 8), DecodeTuning(64, 4, 2, False, 8, 0), DecodeTuning(64, 4, 3, False, 8)),
    *(DecodeTuning(128, 8, 2, False, 4), DecodeTuning(64, 4, 2, False, 4, 64), DecodeTuning(32, 4, 3, False, 16)),
    *(DecodeTuning(64, 4, 2, False, 1, 8), DecodeTuning(64, 4, 2, False, 8, 16), DecodeTuning(128, 4, 2, False, 4)),
    *(DecodeTuning(64, 4, 3, True, 8), DecodeTuning(64, 8, 2, False, 8), DecodeTuning(32, 2, 3, False, 16)),
)
PREFILL = (
    *(PrefillTuning(256, 64, 8, 3), PrefillTuning(128, 64, 8, 3), PrefillTuning(128, 128, 8, 2)),
    *(PrefillTuning(64, 64, 4, 3), PrefillTuning(256, 32, 8, 3), PrefillTuning(128, 32, 4, 3)),
    *(PrefillTuning(128, 128, 8, 3), PrefillTuning(64, 128, 4, 2), PrefillTuning(256, 64, 16, 3)),
    *(PrefillTuning(64, 32, 4, 3), PrefillTuning(128, 64, 8, 2), PrefillTuning(128, 64, 4, 3)),
)
GEMV = tuple(GemvTuning(*pair) for pair in ((2, 8), (1, 4), (2, 4), (4, 8), (1, 16)))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tuning to find. operation and key say where in the table it stands, `below` which step of that it is."""

    label: str
    operation: str
    key: dict[str, int]
    below: int | None
    candidates: tuple[Any, ...]
    cases: Callable[[Arena], list[Case]]

    @property
    def default(self) -> Any:
        """What counts without a table."""
        return self.candidates[0]


def _first(default: Any, others: tuple[Any, ...]) -> tuple[Any, ...]:
    return (default, *(one for one in others if one != default))


def _decode_cases(arena: Arena, shape: HeadShape, batch: int) -> list[Case]:
    if batch <= 2:
        return [decode_case(arena, shape, batch, mean, False) for mean in (256, 2000)]
    return [decode_case(arena, shape, batch, 384, False), decode_case(arena, shape, batch, 500, True)]


def decode_entries(name: str, shape: HeadShape) -> list[Entry]:
    """By programs; what no batch comes to is left out."""
    heads, kv_heads, size = shape
    group = heads // kv_heads
    ends = [start for start, _ in DECODE_STEPS[1:]]
    reached = [end > kv_heads for end in ends] + [True]
    last = max(i for i, (start, _) in enumerate(DECODE_STEPS) if start < MOST_SEQUENCES * kv_heads)
    entries = []
    for i, (start, programs) in enumerate(DECODE_STEPS[: last + 1]):
        if not reached[i]:
            continue
        batch = min(MOST_SEQUENCES, max(1, programs // kv_heads))
        default = default_decode(BITS // 8, size, group).at(batch * kv_heads)
        entries.append(
            Entry(
                f"decode {name}, {batch} sequences",
                "decode",
                {"bits": BITS, "head_size": size, "group": group},
                ends[i] if i < last else None,
                _first(default, FEW if start < 256 else MANY),
                partial(_decode_cases, shape=shape, batch=batch),
            )
        )
    return entries


def _prefill_cases(arena: Arena, shape: HeadShape, cases: tuple[tuple[int, int, int, int], ...]) -> list[Case]:
    return [prefill_case(arena, shape, *case) for case in cases]


def prefill_entries(name: str, shape: HeadShape) -> list[Entry]:
    """By the most query tokens of a sequence, the longest first."""
    group = shape.heads // shape.kv_heads
    ends = [start for start, _ in PREFILL_STEPS[1:]] + [None]
    entries = [
        Entry(
            f"prefill {name}, {max(count for _, count, _, _ in cases)} tokens",
            "prefill",
            {"bits": BITS, "head_size": shape.size, "group": group},
            end,
            _first(default_prefill(BITS // 8, shape.size, group).at(start), PREFILL),
            partial(_prefill_cases, shape=shape, cases=cases),
        )
        for (start, cases), end in zip(PREFILL_STEPS, ends, strict=True)
    ]
    return entries[::-1]


def _gemv_cases(arena: Arena, outputs: int, inputs: int) -> list[Case]:
    return [gemv_case(arena, outputs, inputs)]


def gemv_entries() -> list[Entry]:
    """By the weight's shape."""
    return [
        Entry(
            f"gemv {outputs} x {inputs}",
            "gemv",
            {"outputs": outputs, "inputs": inputs},
            None,
            _first(default_gemv(outputs, inputs), GEMV),
            partial(_gemv_cases, outputs=outputs, inputs=inputs),
        )
        for outputs, inputs in WEIGHTS
    ]


def all_entries() -> list[Entry]:
    """Of every shape."""
    first, *others = SHAPES.items()
    entries = prefill_entries(*first) + decode_entries(*first) + gemv_entries()
    for name, shape in others:
        entries += decode_entries(name, shape) + prefill_entries(name, shape)
    return entries


def as_json(tuning: Any) -> dict[str, int | bool]:
    """As a table holds it."""
    return asdict(tuning)
