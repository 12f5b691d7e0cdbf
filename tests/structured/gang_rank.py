"""What each of two gloo processes runs in test_structured_gang.py. A module of its own: spawn imports it again."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import tokenizers
from structured_asks import often_preempting

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.grammar import GrammarKind, GrammarSpec
from workers.api.request import EngineRequest, SamplingParams
from workers.engine.core import Engine
from workers.execution.gang import GangExecutor, follow
from workers.parallel.channel import PlanReceiver, PlanSender
from workers.parallel.group import connect, disconnect
from workers.rank import Rank, run_to_completion

DEMO = Path(__file__).parents[2] / "configs" / "demo-model"
END = 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 7, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
OBJECT = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
WORDS = GrammarSpec(GrammarKind.REGEX, "[a-z]{2,9}( [a-z]{2,9}){2}")
Answers = dict[str, list[int]]


def requests() -> list[EngineRequest]:
    """Three with grammars, one of them greedy, and a plain one between them."""
    text = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompt = tuple(text.encode("One day Ida met").ids)

    def ask(name: str, grammar: GrammarSpec | None, temperature: float) -> EngineRequest:
        params = SamplingParams(40, seed=len(name), temperature=temperature, stop_ids=(END,))
        return EngineRequest(name, prompt, params, grammar=grammar)

    return [ask("object", OBJECT, 1.0), ask("plain", None, 1.0), ask("words", WORDS, 1.0), ask("greedy", OBJECT, 0.0)]


def config(size: int) -> ReplicaConfig:
    """The demo model in fp32 on the CPU."""
    model = ModelConfig(str(DEMO), "demo", dtype="float32")
    return ReplicaConfig(model, EngineConfig(num_blocks=64, max_num_seqs=4), tensor_parallel=size, device="cpu")


def answers(engine: Engine) -> tuple[list[Answers], int]:
    """Undisturbed, resumed in the middle, preempted often; and the number of preemptions."""
    whole = run_to_completion(engine, requests())
    halves = {name: len(ids) // 2 for name, ids in whole.items()}
    again = [replace(one, resumed_ids=tuple(whole[one.id][: halves[one.id]])) for one in requests()]
    resumed = run_to_completion(engine, again)
    engine._scheduler._make_room = often_preempting(engine)  # type: ignore[method-assign]
    preempted = run_to_completion(engine, requests())
    engine.check_ledgers()
    return [whole, {name: whole[name][: halves[name]] + ids for name, ids in resumed.items()}, preempted], (
        engine.stats.preemptions
    )


def main(number: int, folder: str) -> None:
    """Rank 0 plans and writes what came of it beside the meeting's address."""
    groups = connect(rank=number, tensor_parallel=2, init_method=f"file://{folder}/meet", timeout_seconds=60)
    rank = Rank(config(2), rank=number, groups=groups, threads=1)
    plans = Path(folder) / "plans"
    if number:
        deadline = time.monotonic() + 60
        while not plans.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        host, port, secret = plans.read_text().split()
        follow(rank.runner, PlanReceiver((host, int(port)), secret, f"rank {number}"))
    else:
        sender = PlanSender("127.0.0.1", 1)
        written = Path(folder) / "plans.new"
        written.write_text(f"{sender.address[0]} {sender.address[1]} {sender.secret}")
        written.rename(plans)
        sender.accept()
        found = answers(rank.make_engine(GangExecutor(rank.runner, sender)))
        sender.close()
        (Path(folder) / "answers").write_text(json.dumps(found))
    rank.close()
    disconnect()
