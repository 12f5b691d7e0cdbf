"""`structured.py pairs`: plain streams beside others that are plain, and beside others that have a grammar, in turns.

Shapes: `demo` is the demo model. `8b` is that of Llama-3.1-8B in bf16 with random weights, `tiny` one of two small
layers for a CPU; both have a vocabulary of 128,256 tokens from `made_tokenizer.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import workloads
from load.engine_target import load_rank
from made_tokenizer import END, write_tokenizer
from tokenizers import Tokenizer

from workers.api.config import EngineConfig
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine

DEMO = Path(__file__).parents[1] / "configs" / "demo-model"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "float32"}  # fmt: skip
PROMPT = 32  # tokens
RESAMPLES = 10_000

# What never ends within the limit: both kinds of neighbours stay as long as the streams.
_FREE = {
    "name": {"type": "string", "maxLength": 40},
    "note": {"type": "string", "maxLength": 400},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1},
    "age": {"type": "integer"},
}
_TIGHT = {
    "id": {"type": "integer", "minimum": 1, "maximum": 99999},
    "kind": {"enum": ["created", "changed", "moved", "deleted", None]},
    "at": {"type": "string", "format": "date-time"},
    "done": {"type": "boolean"},
}
PARTS = {"free": _FREE, "tight": _TIGHT}


def grammar_of(kind: str, tokens: int) -> GrammarSpec:
    """An endless array of objects. It wraps up as answers of so many tokens do unless a request says otherwise."""
    one = {"type": "object", "required": list(PARTS[kind]), "additionalProperties": False, "properties": PARTS[kind]}
    schema = {"type": "array", "minItems": 400, "items": one}
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema), wrap_up=min(256, tokens // 4))


@dataclass(frozen=True, slots=True)
class Model:
    """An engine and what requests to it need to know."""

    engine: Engine
    end: int
    prompt_ids: range  # of plain tokens


@contextmanager
def model_of(shape: str, most: int) -> Iterator[Model]:
    """A model of `shape` for `most` sequences at a time; its ledgers are checked at the end."""
    limits = EngineConfig(max_num_seqs=most, max_num_batched_tokens=max(512, most), num_blocks=64 * most)
    with tempfile.TemporaryDirectory(prefix="grammar-pairs-") as made:
        folder = DEMO if shape == "demo" else Path(made)
        if shape != "demo":
            config = {**workloads.CONFIG, **(TINY if shape == "tiny" else {})}
            (folder / "config.json").write_text(json.dumps(config))
            write_tokenizer(folder / "tokenizer.json", workloads.VOCAB)
        rank = load_rank(str(folder), limits, random=shape != "demo", threaded=True)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        engine = rank.make_engine()  # has read the tokenizer
    end = tokenizer.token_to_id("<|end|>" if shape == "demo" else END)
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in rank.phases.items())
    print(f"{shape} on {device_name()}: loaded in {sum(rank.phases.values()):.1f} s ({phases})", flush=True)
    try:
        yield Model(engine, end, range(300, 900))
        while engine.has_work:
            engine.step()
        engine.check_ledgers()
    finally:
        rank.close()


def device_name() -> str:
    """Of the device, or of nothing but processors."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} processors"


@dataclass(slots=True)
class Run:
    """One run. Milliseconds, the last two a step: `mask` is of each step that had masks."""

    per_token: float  # of the plain streams, from their first tokens to their last
    host: float  # of the engine's thread
    waited: float  # of the same, for the device
    processor: float  # of all threads
    mask: list[float] = field(default_factory=list)
    put_off: float = 0.0  # draws that were left to a later step, for each that counted, of the others


def timed(model: Model, plain: int, beside: int, grammar: GrammarSpec | None, args: argparse.Namespace) -> Run:
    """`plain` streams beside `beside` others, which have a grammar or not."""
    engine, stats, masks = model.engine, model.engine.stats, []

    def ask(name: str, seed: int, grammar: GrammarSpec | None) -> None:
        prompt = tuple(Random(seed).choices(model.prompt_ids, k=PROMPT))
        ends = () if grammar is None else (model.end,)
        params = SamplingParams(args.tokens, seed=seed, temperature=args.temperature, stop_ids=ends)
        engine.submit(EngineRequest(name, prompt, params, grammar=grammar))

    jobs = engine._masks
    assert jobs is not None
    compute = jobs.masks

    def computed(*of_step: Any, **terms: Any) -> Any:
        began = time.perf_counter()
        found = compute(*of_step, **terms)
        masks.append((time.perf_counter() - began) * 1e3)
        return found

    for i in range(plain):
        ask(f"plain.{i}", i, None)
    for i in range(beside):
        ask(f"beside.{i}", plain + i, grammar)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    host, waited, steps, began = stats.host_seconds, stats.wait_seconds, stats.steps, time.process_time()
    put_off = stats.put_off
    with patch.object(jobs, "masks", computed):
        while engine.has_work:
            deltas = engine.step()
            now = time.perf_counter()
            for delta in deltas:
                if delta.error is not None:
                    raise SystemExit(f"{delta.request_id}: {delta.error}")
                if delta.request_id[0] == "p":
                    first.setdefault(delta.request_id, now)
                    last[delta.request_id] = now
    steps = stats.steps - steps
    return Run(
        statistics.mean((last[n] - first[n]) / (args.tokens - 1) * 1e3 for n in first),
        (stats.host_seconds - host) / steps * 1e3,
        (stats.wait_seconds - waited) / steps * 1e3,
        (time.process_time() - began) / steps * 1e3,
        masks,
        (stats.put_off - put_off) / (beside * args.tokens),
    )


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """The bootstrap's 95 % interval of the median."""
    random = Random(seed)
    medians = sorted(statistics.median(random.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40 - 1]


def run(args: argparse.Namespace) -> None:
    """All settings in turns, a pair of each at a time; the first pair of each warms up."""
    began = time.perf_counter()
    if len(args.streams) != len(args.beside):
        raise SystemExit("--streams and --beside: as many numbers of the one as of the other")
    sizes = list(zip(args.streams, args.beside, strict=True))
    settings = [(plain, beside, kind) for plain, beside in sizes for kind in args.grammar]
    found: dict[tuple[int, int, str], list[tuple[Run, Run]]] = {setting: [] for setting in settings}
    with model_of(args.shape, max(map(sum, sizes))) as model:
        specs = {kind: grammar_of(kind, args.tokens) for kind in args.grammar}
        assert model.engine.grammars is not None
        for kind, spec in specs.items():
            at = time.perf_counter()
            model.engine.grammars.compile(spec)
            print(f"grammar {kind!r} compiled in {time.perf_counter() - at:.2f} s", flush=True)
        for pair in range(args.pairs + 1):
            if pair > 1 and args.seconds and time.perf_counter() - began > args.seconds:
                break
            for plain, beside, kind in settings:
                runs = {
                    masked: timed(model, plain, beside, specs[kind] if masked else None, args)
                    for masked in ((False, True) if pair % 2 else (True, False))
                }
                if pair:
                    found[plain, beside, kind].append((runs[False], runs[True]))
    for setting, pairs in found.items():
        report(*setting, pairs, args)
    print(f"{time.perf_counter() - began:.0f} s in all")


def report(plain: int, beside: int, kind: str, pairs: list[tuple[Run, Run]], args: argparse.Namespace) -> None:
    """Prints the figures of one setting."""
    print(f"\n{plain} plain streams beside {beside}, grammar {kind!r}, {args.tokens} tokens each, n={len(pairs)} pairs")
    for who, runs in (("plain ones", [a for a, _ in pairs]), ("ones with a grammar", [b for _, b in pairs])):
        times = spread([one.per_token for one in runs], ".3f")
        host, waited = (statistics.median(getattr(one, name) for one in runs) for name in ("host", "waited"))
        print(f"  beside {who}: {times} ms a token; the host: {host:.2f} ms a step at work, {waited:.2f} waiting")
    masks = sorted(one for _, run in pairs for one in run.mask)
    if masks:
        p50, p90, p99 = (masks[min(len(masks) - 1, int(len(masks) * part))] for part in (0.5, 0.9, 0.99))
        quantiles = f"p50 {p50:.2f} ms, p90 {p90:.2f}, p99 {p99:.2f}, greatest {masks[-1]:.2f}"
        put_off = statistics.median(run.put_off for _, run in pairs)
        print(f"  waiting for a step's masks: {quantiles}, n={len(masks)}; {put_off:.1%} of draws were put off")
    for what, name in (("slower beside those with a grammar", "per_token"), ("processor time, of all", "processor")):
        more = [100 * (getattr(b, name) / getattr(a, name) - 1) for a, b in pairs]
        low, high = interval(more)
        print(f"  {what}: {spread(more, '+.2f')} %, 95 % interval of the median {low:+.2f}..{high:+.2f}")


def spread(values: list[float], form: str) -> str:
    """Median, least, greatest."""
    return f"median {statistics.median(values):{form}} ({min(values):{form}}..{max(values):{form}})"
