"""Beam search: the time of a token, beside as many drawn answers, beside transformers, and what others feel of it.

    python benchmarks/beam_search.py                                                # CPU, the demo model
    python benchmarks/beam_search.py --model llama-8b --prompts 128 2048 7000        # one GPU, random weights

A search of W beams and W drawn answers (their log-probabilities with them) alternate in one process, each behind a
prompt that no run has had before; transformers' `generate(num_beams=W)`, if asked for with --peer, runs afterwards.
A token is what all W beams have grown by: (time of the answer - time of its first token) / (tokens - 1), so that the
prompt does not count. `host` is the engine's own work a step. Last: plain streams beside a search, and beside W drawn
answers, in pairs. Ratios count, digits depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from load.engine_target import RANDOM_8B, folder_of, load_rank
from load.transformers_target import load_model

from workers.api.config import EngineConfig
from workers.api.request import BeamParams, EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.rank import Rank

PLAIN = 8  # streams of others, each behind a prompt of
PLAIN_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Milliseconds a token, of all beams together; of the engine's own work a step; and of the plain streams beside."""

    token: float
    host: float
    beside: float = 0.0


class Bench:
    """One rank, and prompts that come once."""

    def __init__(self, rank: Rank, out: int) -> None:
        self.rank, self.engine, self.out = rank, rank.make_engine(), out
        self._random = Random(0)
        self._asked = 0

    def prompt(self, length: int) -> tuple[int, ...]:
        """Token ids of any kind."""
        return tuple(self._random.choices(range(10, self.rank.vocab_size - 10), k=length))

    def run(self, width: int, length: int, *, search: bool, plain: int = 0) -> Run:
        """`width` answers behind a prompt of `length` tokens, beside `plain` streams."""
        self._asked += 1
        engine, ids, name = self.engine, self.prompt(length), f"r{self._asked}"
        for i in range(plain):
            params = SamplingParams(4 * self.out, temperature=0.0)
            engine.submit(EngineRequest(f"p{self._asked}.{i}", self.prompt(PLAIN_PROMPT), params))
        greedy = SamplingParams(self.out, temperature=0.0)
        warm = EngineRequest(f"w{self._asked}", ids, replace(greedy, max_tokens=1))
        _until_last(engine, warm)  # the prompt is in the cache for both
        stats = engine.stats
        steps, host = stats.steps, stats.host_seconds
        if search:
            asked = [EngineRequest(name, ids, greedy, beams=BeamParams(width))]
        else:
            drawn = replace(greedy, temperature=1.0, logprobs=width)
            asked = [EngineRequest(f"{name}.{i}", ids, replace(drawn, seed=i)) for i in range(width)]
        began, before = time.perf_counter(), _tokens(engine)
        for one in asked:
            engine.submit(one)
        left = len(asked) * (width if search else 1)
        while left:
            left -= sum(delta.finish is not None and delta.request_id[0] == "r" for delta in engine.step())
        seconds = time.perf_counter() - began
        steps, host = stats.steps - steps, stats.host_seconds - host
        streamed = _tokens(engine) - before
        for i in range(plain):
            engine.abort(f"p{self._asked}.{i}")
        while engine.has_work:
            engine.step()
        engine.check_ledgers()
        beside = 1e3 * seconds * plain / streamed if plain else 0.0
        return Run(1e3 * seconds / self.out, 1e3 * host / steps, beside)


def _tokens(engine: Engine) -> int:
    """Emitted so far by the plain streams."""
    return sum(s.num_emitted for name, s in engine.roster.live.items() if name[0] == "p")


def _until_last(engine: Engine, asked: EngineRequest) -> None:
    engine.submit(asked)
    while not any(delta.request_id == asked.id and delta.finish for delta in engine.step()):
        pass


def transformers_token(model: torch.nn.Module, prompt: Callable[[int], tuple[int, ...]], args: argparse.Namespace,
                       width: int, length: int) -> list[float]:  # fmt: skip
    """Milliseconds a token of `generate`, the prompt's own time taken away as that of an answer of one token."""
    found = []
    for rep in range(args.repeat + 1):
        ids = torch.tensor([prompt(length)], device=model.device)
        took = []
        for out in (1, args.out):
            began = time.perf_counter()
            with torch.inference_mode():
                rows = model.generate(  # type: ignore[operator]
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=out, num_beams=width, do_sample=False,
                    early_stopping="never", eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            rows.cpu()
            took.append(time.perf_counter() - began)
        if rep:
            found.append(1e3 * (took[1] - took[0]) / (args.out - 1))
    return found


def spread(values: list[float]) -> str:
    """The median with the least and the greatest."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    """Print all figures; --json keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help=f"demo, {RANDOM_8B} or a folder (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256], help="tokens")
    parser.add_argument("--out", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help=f"of {RANDOM_8B}; 0: all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--peer", action="store_true", help="transformers, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048)
    rank = load_rank(args.model, limits, dtype=args.dtype, layers=args.layers, threaded=True)
    bench = Bench(rank, args.out)
    cells: dict[str, dict[str, list[float]]] = {}
    for length in args.prompts:
        for width in args.widths:
            runs: dict[str, list[Run]] = {"search": [], "drawn": [], "search beside": [], "drawn beside": []}
            for rep in range(args.repeat + 1):
                for kind, of_kind in runs.items():
                    beside = PLAIN if kind.endswith("beside") else 0
                    run = bench.run(width, length, search=kind.startswith("search"), plain=beside)
                    if rep:
                        of_kind.append(run)
            search, drawn = runs["search"], runs["drawn"]
            more = [100 * (a.beside / b.beside - 1) for a, b in
                    zip(runs["search beside"], runs["drawn beside"], strict=True)]  # fmt: skip
            cell = {
                "search_ms": [run.token for run in search],
                "drawn_ms": [run.token for run in drawn],
                "ratio": [a.token / b.token for a, b in zip(search, drawn, strict=True)],
                "search_host_ms": [run.host for run in search],
                "drawn_host_ms": [run.host for run in drawn],
                "others_slower_percent": more,
            }
            cells[f"{length}/{width}"] = cell
            print(f"prompt {length}, {width} beams: " + "; ".join(f"{k} {spread(v)}" for k, v in cell.items()),
                  flush=True)  # fmt: skip
    rank.close()
    del bench, rank
    if args.peer:
        if device == "cuda":
            torch.cuda.empty_cache()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        folder = folder_of(args.model, layers=args.layers)
        model = load_model(folder, dtype=dtype, device=torch.device(device), random=args.model == RANDOM_8B)
        random = Random(1)

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(random.choices(range(10, model.config.vocab_size - 10), k=length))

        for length in args.prompts:
            for width in args.widths:
                found = transformers_token(model, prompt, args, width, length)
                cell = cells[f"{length}/{width}"]
                cell["transformers_ms"] = found
                ours = statistics.median(cell["search_ms"])
                print(f"prompt {length}, {width} beams: transformers {spread(found)} ms a token, "
                      f"{statistics.median(found) / ours:.1f} times ours", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"device": device, "args": {**vars(args), "json": None}, "cells": cells}))


if __name__ == "__main__":
    main()
