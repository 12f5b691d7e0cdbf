"""Structured output on the demo model: how many answers stop, how many of those are valid, what others pay.

    python benchmarks/structured.py answers [--schemas 500] [--seed 0] [--tokens 1024] [--wrap-up -1] [--seqs 32]
    python benchmarks/structured.py pairs [--pairs 12] [--streams 8] [--beside 8] [--tokens 160]

`answers` asks for one answer a schema (temperature 1, seeded) and judges it with jsonschema, formats included. `pairs`
times plain streams beside others that are plain, and beside others that have a grammar, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from typing import Any

import jsonschema
from one_process import DEMO, demo_engine
from structured_schemas import schemas
from tokenizers import Tokenizer

from router.protocol.structured import default_wrap_up
from router.text.grammars import GrammarChecks
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, FinishReason, SamplingParams
from workers.engine.core import Engine

END = 1
TEXT = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
PROMPT = "<|begin|><|user|>Give me a {} as JSON.<|end|><|assistant|>"


def ask(name: str, grammar: GrammarSpec | None, prompt: str, seed: int, tokens: int, *, ends: bool) -> EngineRequest:
    params = SamplingParams(max_tokens=tokens, seed=seed, stop_ids=(END,) if ends else ())
    return EngineRequest(name, tuple(TEXT.encode(prompt).ids), params, grammar=grammar)


def judge(text: str, schema: dict[str, Any]) -> str:
    """What is wrong with an answer; "" if nothing."""
    try:
        value = json.loads(text)
    except ValueError as e:
        return f"not JSON: {e}"
    kind = jsonschema.Draft202012Validator  # its own formats: those of draft 3 know no time with an offset
    error = jsonschema.exceptions.best_match(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value))
    return "" if error is None else f"{error.validator}: {error.message}"[:120]


def answers(args: argparse.Namespace) -> None:
    asked = schemas(args.schemas, args.seed)
    wrap_up = default_wrap_up(args.tokens) if args.wrap_up < 0 else args.wrap_up
    print(f"{len(asked)} schemas, {sum(free for _, free in asked)} with free strings or arrays; wrap_up {wrap_up}")
    checks, requests, refused = GrammarChecks(), [], Counter[str]()
    for i, (schema, _) in enumerate(asked):
        spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema), wrap_up=wrap_up)
        fault = checks.fault(spec)
        if fault is not None:
            refused[fault.words[:90]] += 1
            continue
        requests.append(ask(str(i), spec, PROMPT.format(next(iter(schema["properties"]))), i, args.tokens, ends=True))
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    finish: dict[str, str] = {}
    began = time.perf_counter()
    with demo_engine(max_num_seqs=args.seqs, num_blocks=4096) as engine:
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
                if delta.finish is not None:
                    finish[delta.request_id] = delta.finish if delta.error is None else f"error: {delta.error[:90]}"
    seconds = time.perf_counter() - began
    ends, wrong, hurried = Counter(finish.values()), Counter[str](), 0
    for request in requests:
        ids = tokens[request.id]
        if finish[request.id] == FinishReason.STOP:
            fault = judge(TEXT.decode(ids), asked[int(request.id)][0])
            if fault:
                wrong[fault] += 1
                print(f"  schema {request.id} invalid: {fault}: {TEXT.decode(ids)[:200]!r}")
            hurried += len(ids) > args.tokens - wrap_up
    stopped = ends[FinishReason.STOP]
    lengths = sorted(len(ids) for ids in tokens.values())
    print(f"refused at the front: {sum(refused.values())} {dict(refused)}")
    print(
        f"ends: {dict(ends)}; {sum(lengths)} tokens in {seconds:.0f} s, median {statistics.median(lengths)} an answer"
    )
    print(f"stopped within {args.tokens} tokens: {stopped}/{len(asked)} = {100 * stopped / len(asked):.1f} %")
    print(f"  of these in their last {wrap_up} tokens, where JSON wraps up: {hurried}")
    print(f"valid of those that stopped: {stopped - sum(wrong.values())}/{stopped} {dict(wrong)}")


def timed(engine: Engine, plain: int, beside: list[EngineRequest], tokens: int, name: str) -> tuple[float, float]:
    """Milliseconds a token of `plain` streams from their first tokens to their last, beside the others; and processor
    time of the whole, all threads, in milliseconds a step.
    """
    names = {f"{name}.{i}" for i in range(plain)}
    for i, other in enumerate(sorted(names)):
        engine.submit(ask(other, None, "Once upon a time", i, tokens, ends=False))
    for request in beside:
        engine.submit(request)
    began, steps = time.process_time(), engine.stats.steps
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.request_id in names:
                first.setdefault(delta.request_id, time.perf_counter())
                last[delta.request_id] = time.perf_counter()
    spent = (time.process_time() - began) / (engine.stats.steps - steps) * 1e3
    return statistics.mean((last[n] - first[n]) / (tokens - 1) * 1e3 for n in names), spent


def pairs(args: argparse.Namespace) -> None:
    # What never ends within the limit: both kinds of neighbours stay as long as the streams.
    spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps({
        "type": "array", "minItems": 400, "items": {
            "type": "object", "required": ["name", "age"], "additionalProperties": False,
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}}}))  # fmt: skip
    ratios: list[float] = []
    spent: list[float] = []
    base: list[float] = []
    with demo_engine(max_num_seqs=args.streams + args.beside, num_blocks=2048) as engine:
        for pair in range(args.pairs + 1):  # the first one warms up
            found = {}
            for kind in ("plain", "grammar") if pair % 2 else ("grammar", "plain"):
                grammar, ends = (spec, True) if kind == "grammar" else (None, False)
                beside = [
                    ask(f"{pair}.{kind}.b{i}", grammar, "Once upon a time", i, args.tokens, ends=ends)
                    for i in range(args.beside)
                ]
                found[kind] = timed(engine, args.streams, beside, args.tokens, f"{pair}.{kind}")
            if pair:
                base.append(found["plain"][0])
                ratios.append(found["grammar"][0] / found["plain"][0])
                spent.append(found["grammar"][1] / found["plain"][1])
    print(f"{args.streams} plain streams beside {args.beside} others, {args.tokens} tokens each, {len(ratios)} pairs")
    print(f"beside plain ones: median {statistics.median(base):.2f} ms a token ({min(base):.2f}..{max(base):.2f})")
    for what, found in (
        ("slower beside ones with a grammar", ratios),
        ("processor time of all, masks included", spent),
    ):
        more = [100 * (ratio - 1) for ratio in found]
        print(f"{what}: median {statistics.median(more):+.1f} % ({min(more):+.1f}..{max(more):+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("answers")
    for name, value in (("schemas", 500), ("seed", 0), ("tokens", 1024), ("wrap-up", -1), ("seqs", 32)):
        one.add_argument(f"--{name}", type=int, default=value)
    one.set_defaults(run=answers)
    two = commands.add_parser("pairs")
    for name, value in (("pairs", 12), ("streams", 8), ("beside", 8), ("tokens", 160)):
        two.add_argument(f"--{name}", type=int, default=value)
    two.set_defaults(run=pairs)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
