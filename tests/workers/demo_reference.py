"""200 prompts for the demo model with transformers' greedy answers, kept in demo_reference.json.

`python tests/workers/demo_reference.py` computes the file again (a minute): after a change of the model or of a prompt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parents[2] / "configs" / "demo-model"
FILE = Path(__file__).with_suffix(".json")
EOS = 1
MAX_NEW = 32
COUNT = 200

ASKED = (
    "What is {a} + {b}?",
    "what's {a} minus {b}",
    "Compute {a} * {b}.",
    "What is the capital of {place}?",
    "Where is {place}?",
    "Hello, I am {name}.",
    "Hi! How are you, {name}?",
    "Tell me about {place} and then what {a} + {b} is.",
    "Thank you, {name}!",
    "Who are you?",
    "{name} has {a} apples and buys {b} more. How many apples are there now?",
    "Count from {a} to {b}.",
)
PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "the moon", "Atlantis", "Brazil")
NAMES = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Zoë")
ANSWERED = ("Yes.", "I do not know.", "That is 12.", "Fine, thanks!")
# Each over 3 blocks of 16 tokens, so that prompts share prefixes.
SYSTEM = (
    "You are a helpful assistant. Answer shortly and say only what you know. " * 4,
    "Answer in one word if you can, and in two words if you cannot. " * 4,
)


def weights_digest() -> str:
    """What the answers belong to."""
    return hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()


@functools.cache
def stored() -> dict[str, Any]:
    """The file. Keys: weights, transformers, max_new, smallest_margin (logits), prompts, answers."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


@functools.cache
def prompts() -> list[tuple[int, ...]]:
    """Conversations of one to a dozen turns, 60 of 200 with a common system message, 10 of random tokens."""
    return [tuple(ids) for ids in stored()["prompts"]]


def answers() -> list[list[int]]:
    """Tokens up to the end of the turn, it included, or MAX_NEW of them."""
    found: list[list[int]] = stored()["answers"]
    return found


def make_prompts(count: int) -> list[tuple[int, ...]]:
    """The same on every machine."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    rng = random.Random(17)
    out: list[tuple[int, ...]] = []
    while len(out) < count:
        if len(out) % 20 == 19:  # nothing that the model has ever seen
            out.append(tuple(rng.randrange(6, 1024) for _ in range(rng.randrange(1, 400))))
            continue
        messages: list[dict[str, str]] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(SYSTEM)})
        for _ in range(rng.choice((1, 1, 1, 2, 4, 12))):
            asked = rng.choice(ASKED).format(
                a=rng.randrange(100), b=rng.randrange(100), place=rng.choice(PLACES), name=rng.choice(NAMES)
            )
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": rng.choice(ANSWERED)}]
        text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= 400:
            out.append(tuple(ids))
    return out


@functools.cache
def model() -> Any:
    """transformers' demo model in fp32."""
    made = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    made.generation_config.eos_token_id = EOS
    return made


@torch.inference_mode()
def generate(ids: Sequence[int]) -> tuple[list[int], float]:
    """transformers' greedy answer, and by how much the logit of its least clear token beats the next best."""
    tokens = torch.tensor([list(ids)])
    out = model().generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


@torch.inference_mode()
def choices(ids: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What transformers finds likeliest at each position of `answer`, given the prompt and the answer before it."""
    logits = model()(torch.tensor([[*ids, *answer[:-1]]])).logits
    return logits[0, len(ids) - 1 :].argmax(-1).tolist()


def main() -> None:
    """Write the file, a line a prompt and a line an answer."""
    asked = make_prompts(COUNT)
    given = [generate(ids) for ids in asked]
    head = {
        "command": "python tests/workers/demo_reference.py",
        "weights": weights_digest(),
        "transformers": transformers.__version__,
        "max_new": MAX_NEW,
        "smallest_margin": round(min(margin for _, margin in given), 6),
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    for key, rows in (("prompts", asked), ("answers", [tokens for tokens, _ in given])):
        body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        lines.append(f'"{key}": [\n{body}\n]')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
