"""How launches are cut: by a table measured on a device's type, else by defaults. Nothing is searched at run time.

`tables/NAME.json` is the table of GPUs with the word NAME in their name; `benchmarks/autotune.py` makes it. It is read
at the first launch on such a device. What it does not name has the defaults, as all has on a device without a table.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from kernels.backend import next_power_of_two

TABLES = Path(__file__).with_name("tables")

Heads: TypeAlias = tuple[int, int, int]  # bytes an element, head size, query heads of a KV head
Weight: TypeAlias = tuple[int, int]  # output and input channels
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


def _check(known: bool, what: object) -> None:
    if not known:
        raise ValueError(f"no launch can be cut like this: {what}")


def _is_power(n: int, least: int, most: int) -> bool:
    return least <= n <= most and n == next_power_of_two(n)


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """Of decode attention: key positions a tile, warps, stages of the pipeline, a loop of its own for the tail, the
    tiles that a split has at least, and up to how many programs a multiprocessor sequences are split into (0: never).
    """

    tile: int
    warps: int
    stages: int
    tail: bool
    least: int = 1
    programs: int = 32

    def __post_init__(self) -> None:
        fits = _is_power(self.tile, 16, 256) and _is_power(self.warps, 1, 16) and 1 <= self.stages <= 8
        _check(fits and isinstance(self.tail, bool) and self.least >= 1 and 0 <= self.programs <= 256, self)


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """Of prefill attention: query rows and key positions a tile, warps, stages of the pipeline, and the most warps
    where a launch has fewer rows.
    """

    rows: int
    tile: int
    warps: int
    stages: int
    warps_of_few: int = 4

    def __post_init__(self) -> None:
        fits = _is_power(self.rows, 16, 512) and _is_power(self.tile, 16, 256) and 1 <= self.stages <= 8
        _check(fits and _is_power(self.warps, 1, 16) and _is_power(self.warps_of_few, 1, 16), self)


@dataclass(frozen=True, slots=True)
class GemvTuning:
    """Of the product for one token: output channels and warps a program."""

    rows: int = 1
    warps: int = 8

    def __post_init__(self) -> None:
        _check(_is_power(self.rows, 1, 16) and _is_power(self.warps, 1, 32), self)


@dataclass(frozen=True, slots=True)
class Steps(Generic[T]):
    """What to take by a number: `tunings[i]` below `bounds[i]`, the last, which has no bound, from there on."""

    bounds: tuple[int, ...]
    tunings: tuple[T, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((0, *self.bounds), self.bounds, strict=False))
        _check(ascending and len(self.tunings) == len(self.bounds) + 1, self)

    def at(self, n: int) -> T:
        """The tuning for `n`."""
        return self.tunings[bisect_right(self.bounds, n)]


def default_decode(itemsize: int, head_size: int, group: int) -> Steps[DecodeTuning]:
    """By the programs of a launch without splits. Fastest on an H100 at 16-bit heads of 128; fp32 must not spill."""
    if itemsize == 4:
        size = max(16, next_power_of_two(head_size))
        stages = 3 if size <= 128 else 2
        exact = DecodeTuning(32 if head_size <= 128 else 16, 8 if size > 64 else 4, stages, True)
        return Steps((2048,), (exact, replace(exact, programs=0)))
    # From 256 programs on the device is busy without splits: only what is much longer than the others is split. Among
    # 2,048, long ones do not matter.
    sparing = DecodeTuning(64, 4, 2, False, least=8)
    return Steps((256, 2048), (DecodeTuning(64, 4, 3, True), sparing, replace(sparing, programs=0)))


def default_prefill(itemsize: int, head_size: int, group: int) -> Steps[PrefillTuning]:
    """By the most query tokens of a sequence: the largest tiles that a Hopper holds without spilling registers.

    fp32 has no matrix unit, so small ones.
    """
    if itemsize == 4:
        return Steps((), (PrefillTuning(32, 32, 4, 2) if head_size <= 64 else PrefillTuning(32, 16, 8, 2, 8),))
    if head_size > 128:
        return Steps((), (PrefillTuning(128, 32, 8, 2, 8),))
    return Steps((1025,), (PrefillTuning(128, 64, 8, 3), PrefillTuning(256, 64, 8, 3)))


def default_gemv(outputs: int, inputs: int) -> GemvTuning:
    """One row a program, whatever the weight's shape."""
    return GemvTuning()


class _WithDefaults(dict[K, V]):
    """Entries of a table. What it lacks is made once, at its first look-up."""

    def __init__(self, entries: Iterable[tuple[K, V]], default: Callable[..., V]) -> None:
        super().__init__(entries)
        self._default = default

    def __missing__(self, key: K) -> V:
        assert isinstance(key, tuple)
        value = self[key] = self._default(*key)
        return value


@dataclass(frozen=True, slots=True)
class Table:
    """The tunings of one type of device: every look-up finds something. `products` are microseconds, by tokens."""

    decode: dict[Heads, Steps[DecodeTuning]]
    prefill: dict[Heads, Steps[PrefillTuning]]
    gemv: dict[Weight, GemvTuning]
    products: dict[Weight, dict[int, float]]

    def product_microseconds(self, weights: Iterable[Weight], tokens: int) -> float | None:
        """Of the library's 16-bit products of so many tokens with all of `weights`; None where that was not measured.

        More tokens may take less: the library has better kernels for some numbers than for others.
        """
        times = [self.products.get(weight, {}).get(tokens) for weight in weights]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None


def _steps(entry: Mapping[str, Any], make: Callable[..., T]) -> tuple[Heads, Steps[T]]:
    steps = entry["steps"]
    *bounds, last = (step["below"] for step in steps)
    _check(last is None and entry["bits"] in (16, 32), entry)
    heads = (entry["bits"] // 8, entry["head_size"], entry["group"])
    return heads, Steps(tuple(bounds), tuple(make(**step["tuning"]) for step in steps))


def make_table(content: Mapping[str, Any]) -> Table:
    """A table out of its JSON. Raises ValueError, KeyError or TypeError where that is not one."""
    return Table(
        _WithDefaults((_steps(entry, DecodeTuning) for entry in content["decode"]), default_decode),
        _WithDefaults((_steps(entry, PrefillTuning) for entry in content["prefill"]), default_prefill),
        _WithDefaults(
            (((entry["outputs"], entry["inputs"]), GemvTuning(**entry["tuning"])) for entry in content["gemv"]),
            default_gemv,
        ),
        {
            (entry["outputs"], entry["inputs"]): {int(n): float(us) for n, us in entry["microseconds"].items()}
            for entry in content.get("products", ())
        },
    )


def find_table(device_name: str, folder: Path = TABLES) -> Path | None:
    """The file for a device of that name ("NVIDIA H100 80GB HBM3": h100.json), if there is one."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return next((path for word in words if (path := folder / f"{word}.json").is_file()), None)


@lru_cache
def table_of(device: torch.device) -> Table:
    """The table of a device's type, read once."""
    path = find_table(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return make_table({"decode": (), "prefill": (), "gemv": ()} if path is None else json.loads(path.read_text()))
