"""What every request of the bench must be answered with: transformers' greedy text in fp32, computed beforehand.

`PYTHONPATH=tests python -m chaos.oracle` makes oracle.json again: after a change of the demo model. A prompt
whose answer hangs on less than MARGIN somewhere is left out, so that the text is the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

FOLDER = Path(__file__).parents[2] / "configs" / "demo-model"
FILE = Path(__file__).with_name("oracle.json")
MOST_TOKENS = 400
COUNT = 16
MARGIN = 1e-3  # of the two best logits; rounding moves them by 1e-5

PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "Brazil", "Italy", "Egypt")


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat of one turn, and the answer it must get: `choices` times the same, being greedy."""

    text: str
    tokens: int
    stream: bool
    choices: int
    logprobs: bool
    expected: str
    prompt_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        """For /v1/chat/completions."""
        whole: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": self.text}],
            "temperature": 0,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "skip_special_tokens": False,  # so that the text is all of the tokens
            "n": self.choices,
            "logprobs": self.logprobs,
        }
        return {**whole, "stream": True, "stream_options": {"include_usage": True}} if self.stream else whole

    @property
    def usage(self) -> tuple[int, int]:
        """Tokens of the prompt and of the answer, as the bill must have them."""
        return self.prompt_tokens, self.tokens * self.choices


class Oracle:
    """Requests without end, the same ones for the same seed."""

    def __init__(self) -> None:
        stored = json.loads(FILE.read_text())
        self.weights: str = stored["weights"]
        self._backend = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self._known: list[tuple[str, int, list[int]]] = [
            (text, prompt_tokens, ids)
            for text, prompt_tokens, ids in zip(
                stored["texts"], stored["prompt_tokens"], stored["answers"], strict=True
            )
        ]

    def ask(
        self, rng: random.Random, *, tokens: tuple[int, int], stream: bool = True, choices: int | None = None
    ) -> Ask:
        """One of the stored prompts, asked for between `tokens` of its answer."""
        text, prompt_tokens, ids = rng.choice(self._known)
        count = rng.randint(tokens[0], min(tokens[1], len(ids)))
        n = choices or rng.choice((1, 1, 1, 1, 2))
        return Ask(text, count, stream, n, rng.random() < 0.3, self._text(tuple(ids[:count])), prompt_tokens)

    def asks(self, seed: str, *, tokens: tuple[int, int]) -> Iterator[Ask]:
        """Those of one client."""
        rng = random.Random(seed)
        while True:
            yield self.ask(rng, tokens=tokens)

    @functools.cache  # noqa: B019  one oracle a process
    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def weights_digest() -> str:
    """What the answers belong to."""
    return hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()


def _texts() -> Iterator[str]:
    rng = random.Random(7)
    while True:
        a, b = rng.randrange(1, 60), rng.randrange(1, 60)
        yield rng.choice(
            [
                f"Count from {a} to {a + b}.",
                f"What is {a} + {b}?",
                f"What is the capital of {rng.choice(PLACES)}?",
                f"Tell me about {rng.choice(PLACES)} and then what {a} + {b} is.",
            ]
        )


def main() -> None:
    """Write the file: an answer of MOST_TOKENS for each prompt, past the end of the turn."""
    import torch
    import transformers

    torch.set_num_threads(1)  # quicker for a model so small
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    candidates = list(dict.fromkeys(itertools.islice(_texts(), 2 * COUNT)))
    turns = [[{"role": "user", "content": text}] for text in candidates]
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits, 1).topk(2).values
    margins = (best[..., 0] - best[..., 1]).min(1).values.tolist()
    clear = [i for i, margin in enumerate(margins) if margin >= MARGIN][:COUNT]
    assert len(clear) == COUNT, f"only {len(clear)} of {len(candidates)} answers are clear"
    smallest = min(margins[i] for i in clear)
    texts = [candidates[i] for i in clear]
    lengths = [int(batch["attention_mask"][i].sum()) for i in clear]
    answers = [out.sequences[i, -MOST_TOKENS:].tolist() for i in clear]
    lines = [
        f'"weights": {json.dumps(weights_digest())}',
        f'"transformers": {json.dumps(transformers.__version__)}',
        f'"smallest_margin": {smallest:.6f}',
        f'"texts": {json.dumps(texts)}',
        f'"prompt_tokens": {json.dumps(lengths)}',
        '"answers": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in answers) + "\n]",
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
