"""`structured.py answers`: how many answers of the demo model in JSON stop, and how many of those are valid."""

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

END = 1
TEXT = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
PROMPT = "<|begin|><|user|>Give me a {} as JSON.<|end|><|assistant|>"


def ask(name: str, grammar: GrammarSpec, prompt: str, seed: int, tokens: int) -> EngineRequest:
    params = SamplingParams(max_tokens=tokens, seed=seed, stop_ids=(END,))
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


def run(args: argparse.Namespace) -> None:
    """Prints what came of one answer a schema."""
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
        requests.append(ask(str(i), spec, PROMPT.format(next(iter(schema["properties"]))), i, args.tokens))
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
