"""What is asked of a target: prompts and lengths, from `workloads.py` or a file, and when each request is sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workloads

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Work:
    """Prompt ids and the number of tokens to generate, a request."""

    prompt: tuple[int, ...]
    out: int


@dataclass(frozen=True, slots=True)
class Pacing:
    """How requests are sent: at most `concurrency` at a time (0: no limit), on average `rate` a second (0: at once)."""

    concurrency: int = 0
    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency < 0 or self.rate < 0:
            raise SystemExit("--concurrency and --request-rate must not be negative")

    def arrivals(self, count: int) -> list[float]:
        """Seconds from the start of each of `count` requests; a Poisson process if there is a rate."""
        if not self.rate:
            return [0.0] * count
        rng, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            now += rng.expovariate(self.rate)
        return times


def make_work(name: str, *, rep: int, divide: int, vocab: int, equal: bool = False) -> list[Work]:
    """The requests of workload `name`, all lengths divided by `divide`; `equal` gives all of them the mean lengths."""
    requests = workloads.ALL[name](rep)
    if vocab >= workloads.VOCAB and divide == 1 and not equal:
        return [Work(tuple(r["prompt"]), r["out"]) for r in requests]
    lengths = [(max(1, len(r["prompt"]) // divide), max(1, r["out"] // divide)) for r in requests]
    if equal:
        mean = tuple(sum(side) // len(lengths) for side in zip(*lengths, strict=True))
        lengths = [(mean[0], mean[1])] * len(lengths)
    rng = random.Random(f"{name}-{rep}")
    # W5 shares its beginning by design; elsewhere no two prompts share anything.
    shared = tuple(rng.randrange(10, vocab - 10) for _ in range(1024 // divide)) if name == "W5" else ()
    return [Work(shared + tuple(rng.randrange(10, vocab - 10) for _ in range(i - len(shared))), o) for i, o in lengths]


def fixed_work(count: int, prompt: int, out: int, *, vocab: int, rep: int) -> list[Work]:
    """`count` requests of `prompt` random ids in and `out` out."""
    rng = random.Random(f"fixed-{count}-{prompt}-{out}-{rep}")
    return [Work(tuple(rng.randrange(10, vocab - 10) for _ in range(prompt)), out) for _ in range(count)]


def read_dataset(path: Path, encode: Encode, *, limit: int = 0) -> list[Work]:
    """Requests of a file: ShareGPT's JSON list (first question and first answer of a talk), or JSON lines with
    `prompt` (text or ids) and `out` (tokens).

    Raises SystemExit, with the place, where a row is neither.
    """
    text = path.read_text("utf-8")
    if text.lstrip().startswith("["):
        rows = [_of_talk(talk, encode) for talk in json.loads(text) if len(talk.get("conversations", ())) >= 2]
    else:
        rows = [_of_line(path, n, line, encode) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    kept = [w for w in rows if w.prompt and w.out]
    if not kept:
        raise SystemExit(f"{path}: no request with a prompt and an answer in it")
    return kept[: limit or None]


def _of_talk(talk: dict[str, Any], encode: Encode) -> Work:
    question, answer = talk["conversations"][:2]
    return Work(tuple(encode(question["value"])), len(encode(answer["value"])))


def _of_line(path: Path, number: int, line: str, encode: Encode) -> Work:
    try:
        row = json.loads(line)
        prompt, out = row["prompt"], int(row["out"])
    except (ValueError, KeyError, TypeError) as exc:
        raise SystemExit(f'{path}, line {number}: not {{"prompt": text or ids, "out": tokens}}: {exc!r}') from exc
    return Work(tuple(encode(prompt) if isinstance(prompt, str) else prompt), out)
