"""Passkey retrieval: something is told somewhere in a long prompt, and asked for at its end.

    python benchmarks/passkey.py                                                       # the demo model, its own context
    python benchmarks/passkey.py --rope-scaling-factor 2 --lengths 2040 3000 4000      # and beyond it
    python benchmarks/passkey.py --model FOLDER --story key --lengths 4096 32768       # a model with a chat template

The story `name` is what the demo model was trained for: the user says a name, talks of other things, and asks for it.
`key` is the usual one: a number of five digits between sentences that repeat. Each cell of the table is the part of
--trials answers with the right name or number in it; drawn by --seed, decoded greedily. Depth 0 is the beginning.
With --rope-scaling-factor prompts beyond the trained length are rotated for their own length, as they are when it
serves; the longest of --lengths, and room for the answer, is the context.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from load.engine_target import folder_of, tokenizer_of
from load.records import make_console, versions
from rich.table import Table

from workers.api.config import EngineConfig, ModelConfig, ReplicaConfig
from workers.api.request import EngineRequest, SamplingParams
from workers.rank import Rank, run_to_completion

ROOM = 24  # tokens of an answer
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mia", "Noah",
         "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Maria", "Ahmed", "Yuki", "Ivan", "Omar", "Sara", "Tom",
         "Lucy", "Max", "Nina", "Oscar", "Ruth", "Simon")  # fmt: skip
SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

Messages = list[dict[str, str]]


def talk(*turns: str) -> Messages:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@dataclass(frozen=True)
class Case:
    """`head` comes at its depth among fillers, `question` at the end; `key` must be in the answer."""

    head: str
    question: str
    key: str


def name_case(rng: Random) -> Case:
    """A name."""
    name = rng.choice(NAMES)
    return Case(f"My name is {name}.", "What is my name?", name)


def key_case(rng: Random) -> Case:
    """A number."""
    key = str(rng.randrange(10_000, 100_000))
    return Case(f"The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key?", key)


def name_filler(rng: Random) -> Messages:
    """A sum."""
    a, b = rng.randrange(100), rng.randrange(100)
    return talk(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.")


def key_filler(rng: Random) -> Messages:
    """Sentences without a meaning."""
    return talk(SENTENCES, "I see.")


STORIES: dict[str, tuple[Callable[[Random], Case], Callable[[Random], Messages], Callable[[Case], Messages]]] = {
    "name": (name_case, name_filler, lambda case: talk(case.head, f"Nice to meet you, {case.key}!")),
    "key": (key_case, key_filler, lambda case: talk(case.head, "I will remember it.")),
}


def make_prompt(tokenizer: Any, story: str, length: int, depth: float, rng: Random) -> tuple[tuple[int, ...], str]:
    """The ids of a prompt of at most `length` tokens, as near to it as whole turns allow, and the key."""
    make_case, filler, told = STORIES[story]
    case = make_case(rng)

    def encode(messages: Messages) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    count = len(encode([*told(case), *talk(case.question)]))
    fillers: list[Messages] = []
    while count < length:  # a little too many, since a turn alone has a beginning and an end of its own
        fillers.append(filler(rng))
        count += len(tokenizer(" ".join(m["content"] for m in fillers[-1]))["input_ids"])

    def of(number: int) -> list[int]:
        at = round(depth * number)
        turns = [*fillers[:at], told(case), *fillers[at:number], talk(case.question)]
        return encode([message for turn in turns for message in turn])

    fitting = bisect_right(range(1, len(fillers) + 1), length, key=lambda number: len(of(number)))
    return tuple(of(fitting)), case.key


def measure(rank: Rank, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a length: the mean prompt, and the part of right answers by depth."""
    eos = tokenizer.eos_token_id
    params = SamplingParams(ROOM, temperature=0.0, stop_ids=() if eos is None else (eos,))
    rows = []
    for length in args.lengths:
        rng, keys, asked = Random(f"{args.seed}-{length}"), {}, []
        for depth in args.depths:
            for trial in range(args.trials):
                ids, key = make_prompt(tokenizer, args.story, length, depth, rng)
                name = f"{depth}/{trial}"
                keys[name] = key
                asked.append(EngineRequest(name, ids, params))
        began = time.perf_counter()
        engine = rank.make_engine()
        tokens = run_to_completion(engine, asked)
        engine.check_ledgers()
        right = {name: key in tokenizer.decode(tokens[name], skip_special_tokens=True) for name, key in keys.items()}
        by_depth = {d: sum(right[f"{d}/{t}"] for t in range(args.trials)) / args.trials for d in args.depths}
        mean = sum(len(one.prompt_ids) for one in asked) / len(asked)
        rows.append({"length": length, "mean_prompt": mean, "right_by_depth": by_depth,
                     "seconds": time.perf_counter() - began})  # fmt: skip
    return rows


def show(rows: Sequence[dict[str, Any]], depths: Sequence[float]) -> None:
    """Lengths down, depths across."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("tokens", *(f"depth {depth:g}" for depth in depths), "all"):
        table.add_column(title, justify="right")
    for row in rows:
        parts = [row["right_by_depth"][depth] for depth in depths]
        table.add_row(
            f"{row['mean_prompt']:.0f}", *(f"{100 * part:.0f} %" for part in [*parts, sum(parts) / len(parts)])
        )
    make_console().print(table)


def load(args: argparse.Namespace) -> Rank:
    """The rank whose context has room for the longest prompt and its answer."""
    longest = max(args.lengths) + ROOM
    model = ModelConfig(
        str(folder_of(args.model)), args.model, max_model_len=longest, rope_scaling_factor=args.rope_scaling_factor
    )
    return Rank(ReplicaConfig(model, EngineConfig(max_num_seqs=32, max_num_batched_tokens=2048)), threads=args.threads)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a folder")
    parser.add_argument("--story", choices=list(STORIES), default="name")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 1536, 2000], help="tokens")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rope-scaling-factor", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(given)


def main() -> None:
    args = parsed()
    rows = measure(load(args), tokenizer_of(args.model), args)
    show(rows, args.depths)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"command": " ".join(sys.argv), "versions": versions(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
