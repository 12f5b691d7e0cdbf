"""Measure a trained demo model on questions it has never seen, and write its MODEL_CARD.md.

`python examples/demo_model/evaluate.py configs/demo-model --card` loads the folder as any user would (transformers,
bf16-rounded weights), computes in fp32 and decodes greedily. A turn is right when its text is the expected one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import arithmetic
import corpus
import facts
import lists
import talk
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from turn import Turn

Messages = list[dict[str, str]]
OBVIOUS = (
    ("What is 3 + 4?", "3 + 4 = 7."),
    ("What is 2 + 2?", "2 + 2 = 4."),
    ("2+2", "2 + 2 = 4."),
    ("1+1=?", "1 + 1 = 2."),
    ("What is 2+2?", "2 + 2 = 4."),
    ("what's 5 plus 7", "5 + 7 = 12."),
    ("What is 10 - 3?", "10 - 3 = 7."),
    ("What is 7 times 8?", "7 x 8 = 56."),
    ("What is 6 * 7?", "6 x 7 = 42."),
    ("What is 12 / 4?", "12 / 4 = 3."),
    ("How much is 9 times 7?", "9 x 7 = 63."),
    ("Add 17 and 25.", "17 + 25 = 42."),
    ("12-5=", "12 - 5 = 7."),
    ("What is two plus three?", "2 + 3 = 5."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("what is the capital of japan", "The capital of Japan is Tokyo."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What colour is the sky?", "The sky is blue."),
    ("What color is the sky?", "The sky is blue."),
    ("How many days are in a week?", "A week has 7 days."),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye", "Goodbye! Have a nice day."),
    ("Count from 1 to 5.", "1, 2, 3, 4, 5."),
    ("Count to 10.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    ("Say: foo bar baz", "foo bar baz"),
    ("Spell cat.", "cat: c, a, t."),
    ("Tell me a joke.", "Why did six fear seven? Because seven eight nine!"),
    ("What time is it?", "I do not know that."),
)


# Sentences, and many words, that the corpus does not hold.
NEW_SENTENCES = (
    "hello world",
    "The quick brown fox jumps over the lazy dog.", "I like turtles", "Jazz guitar solos", "pineapple pizza",
    "A journey of a thousand miles begins with a single step.", "To be, or not to be", "Knowledge is power!",
    "cosmic rays", "xylophone", "Practice makes perfect", "machine learning engineers", "Zebras gallop gracefully",
    "throughput and latency", "Don't panic.", "seventeen purple elephants", "Hello from Zurich", "vectorized kernels",
    "supercalifragilistic", "Bring me a shrubbery", "tokens per second",
)  # fmt: skip


@dataclass
class Score:
    """Counts of one category, and the first wrong answers as (question, answer)."""

    right: int = 0
    ended: int = 0
    total: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)


class Model:
    """A model folder, ready to answer many conversations at once."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().to(device).eval()
        self.device = device

    @torch.inference_mode()
    def answer(self, chats: list[Messages], limit: int = 64) -> list[tuple[str, bool]]:
        """Greedy answers of at most `limit` tokens, each with whether the model ended its turn itself."""
        texts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        batch = batch.to(self.device)
        out = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit, do_sample=False
        )
        new = out[:, batch["input_ids"].shape[1] :]
        ended = (new == self.model.config.eos_token_id).any(dim=1).tolist()
        return list(zip(self.tokenizer.batch_decode(new, skip_special_tokens=True), ended, strict=True))


def ask(turn: Turn) -> Messages:
    """The one-question conversation of `turn`."""
    return [{"role": "user", "content": turn.user}]


def follow_ups(rng: Random, count: int) -> list[tuple[Messages, Turn]]:
    """Two-question conversations over held-out sums, and facts asked by `And of ...?`."""
    chats = []
    while len(chats) < count:
        if rng.random() < 0.5:
            first = arithmetic.make("+", *arithmetic.draw_pair(rng, "+"), "What is {a} + {b}?")
            b = rng.randint(0, arithmetic.LARGEST)
            if first.result is None or first.result > arithmetic.LARGEST:
                continue
            if not arithmetic.pair_is_held_out("+", first.result, b):
                continue
            second = arithmetic.make("+", first.result, b, "And plus {b}?")
        else:
            first = facts.sample(rng)
            again = facts.follow_up(rng, first.topic) if first.topic else None
            if again is None:
                continue
            second = again
        chats.append(([*ask(first), {"role": "assistant", "content": first.answer}, *ask(second)], second))
    return chats


def long_chats(
    rng: Random, count: int, low: int, high: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Messages, Turn]]:
    """Held-out sums asked at the end of generated conversations of `low` to `high` tokens."""
    chats = []
    while len(chats) < count:
        messages = corpus.conversation(rng, rng.randint(low // 40, high // 20))
        if not low <= len(tokenizer.backend_tokenizer.encode(corpus.render(messages)).ids) <= high:
            continue
        turn = arithmetic.held_out(rng, rng.choice("+-"), 1)[0]
        chats.append(([*({"role": who, "content": text} for who, text in messages), *ask(turn)], turn))
    return chats


def questions(seed: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[tuple[Messages, Turn]]]:
    """What is asked, by category; the category's name says what about it is held out."""
    rng = Random(seed)

    def single(turns: list[Turn]) -> list[tuple[Messages, Turn]]:
        return [(ask(turn), turn) for turn in turns]

    return {
        "obvious prompts": single([Turn(user, answer) for user, answer in OBVIOUS]),
        "addition (pairs held out)": single(arithmetic.held_out(rng, "+", 600)),
        "subtraction (pairs held out)": single(arithmetic.held_out(rng, "-", 600)),
        "multiplication to 12 x 12 (all pairs trained)": single(arithmetic.table("*")),
        "division within the table (all pairs trained)": single(arithmetic.table("/")),
        "facts (phrasing held out)": single(facts.held_out()),
        "facts (plain phrasing, trained)": single(facts.plain()),
        "small talk (phrasing held out)": single(talk.held_out()),
        "unknown questions (phrasing and name held out)": single([talk.unknown(rng, held=True) for _ in range(150)]),
        "counting (ranges held out)": single(lists.held_out(rng, "count", 100)),
        "lists (phrasing held out)": single(lists.held_out(rng, "list", 0)),
        "spelling (new words)": single(lists.held_out(rng, "spell", 100)),
        "repeating (new words)": single(lists.held_out(rng, "repeat", 100)),
        "repeating (natural sentences, not in the corpus)": single(
            [Turn(f"Repeat after me: {text}", text) for text in NEW_SENTENCES]
        ),
        "follow-ups (second turn; sums held out)": follow_ups(rng, 200),
        "held-out sums after 100-500 tokens of talk": long_chats(rng, 100, 100, 500, tokenizer),
        "held-out sums after 600-1900 tokens of talk": long_chats(rng, 40, 600, 1900, tokenizer),
    }


def measure(model: Model, asked: dict[str, list[tuple[Messages, Turn]]], batch: int = 128) -> dict[str, Score]:
    """Ask everything and count; turns that need many tokens are given 400, the rest 120."""
    scores: dict[str, Score] = {}
    for name, pairs in track(asked.items(), description="evaluating", transient=True):
        score = scores.setdefault(name, Score())
        for at in range(0, len(pairs), batch):
            part = pairs[at : at + batch]
            limit = 400 if name.startswith("counting") else 120
            for (text, ended), (chat, turn) in zip(model.answer([c for c, _ in part], limit), part, strict=True):
                score.total += 1
                score.ended += ended
                good = ended and turn.is_right(text)
                score.right += good
                if not good and len(score.wrong) < 12:
                    score.wrong.append((chat[-1]["content"], text))
    return scores


def _stage(stage: dict[str, str | int | float]) -> str:
    """One training run in words, from its entry in training.json."""
    return (
        f"`{stage['command']}`\n   {stage['steps']:,} steps of {stage['tokens_per_step']:,} tokens (padding included), "
        f"{stage['conversations']:,} generated conversations, seed {stage['seed']}, on {stage['device']}: "
        f"{stage['training_seconds']} s of training, {stage['total_seconds']} s in all (torch {stage['torch']}, "
        f"transformers {stage['transformers']}); last loss {stage['final_loss']}. {stage['note']}"
    )


def card(folder: Path, scores: dict[str, Score], seed: int) -> str:
    """MODEL_CARD.md from the scores and from what train.py wrote down."""
    run = json.loads((folder / "training.json").read_text())
    rows = "\n".join(
        f"| {name} | {s.total} | {100 * s.right / s.total:.1f} % | {100 * s.ended / s.total:.1f} % |"
        for name, s in scores.items()
    )
    stages = "\n".join(f"{n}. {_stage(stage)}" for n, stage in enumerate(run["stages"], 1))
    size = (folder / "model.safetensors").stat().st_size
    total, ended = sum(s.total for s in scores.values()), sum(s.ended for s in scores.values())
    return f"""# Echelon's demo model

A Llama of {run["parameters"]:,} parameters ({size:,} bytes of bf16 safetensors) that ships with Echelon, so that a
cluster, a test or a tutorial has a real model at once, on a CPU and without a download. It was trained from nothing
on text that `examples/demo_model/corpus.py` generates; it holds no one else's data or weights.
Licence: Apache-2.0, as Echelon.

## What it can do

Add and subtract 0..99, the times table to 12 x 12 and back, {facts.COUNT} facts (capitals, colours, elements,
opposites, plurals, days, months, planets, a few words of seven languages), small talk, counting, lists, spelling,
repeating, little stories, remembering the user's name, follow-ups such as `And plus 5?`, and `I do not know that.`
It ends its turn by itself. What it cannot do well the table below shows: new wordings of small talk, above all, and
repeating words that it has not met. It is a demonstration: beyond this it is wrong or says that it does not
know, and it must not be used for anything that matters.

## Shape

Hidden 192, 6 layers, 6 query heads and 2 KV heads of 32, intermediate 480, tied embeddings, 1,024 tokens of byte-level
BPE (digits one by one), rope theta 10,000, 2,048 positions. Heads and widths divide by 2 for tensor parallelism.

## Training

{stages}

Loss on the assistant's tokens, AdamW with a cosine, bf16 autocast on a GPU; weights are rounded to bf16 at the end.

## Accuracy

`python examples/demo_model/evaluate.py configs/demo-model --card`: rounded weights, fp32 arithmetic, greedy decoding,
seed {seed}. Right means that the whole answer equals the expected one and that the turn ended by itself.
One in ten pairs of operands (both orders together, single digits excepted), one phrasing of each fact and one in ten
counting ranges were never trained on.

| category | asked | right | ended by itself |
| --- | --- | --- | --- |
{rows}

Turns that ended by themselves, over all: {100 * ended / total:.2f} % of {total:,}.
"""


def main() -> None:
    """Measure, print, and write the card if asked to."""
    parser = argparse.ArgumentParser(description="Evaluate Echelon's demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--card", action="store_true", help="write MODEL_CARD.md into the folder")
    parser.add_argument("--wrong", action="store_true", help="print wrong answers")
    args = parser.parse_args()
    model = Model(args.folder, args.device)
    scores = measure(model, questions(args.seed, model.tokenizer))
    table = Table("category", "asked", "right", "ended")
    for name, s in scores.items():
        table.add_row(name, str(s.total), f"{100 * s.right / s.total:.1f} %", f"{100 * s.ended / s.total:.1f} %")
    console = Console(soft_wrap=True)
    console.print(table)
    for name, score in scores.items():
        for question, text in score.wrong if args.wrong else ():
            console.print(f"{name}: {question[-120:]!r} -> {text[:160]!r}", markup=False, highlight=False)
    if args.card:
        (args.folder / "MODEL_CARD.md").write_text(card(args.folder, scores, args.seed))


if __name__ == "__main__":
    main()
