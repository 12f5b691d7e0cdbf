"""Conversations for training: turns of every kind mixed, 1 to about 60 turns long, seeded."""

from __future__ import annotations

import re
from random import Random

import arithmetic
import facts
import lists
import talk
from turn import Turn

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, SYSTEM, USER, ASSISTANT, PAD)
# Kinds of turn and how often each is drawn.
KINDS = (
    (arithmetic.sample, 42),
    (facts.sample, 30),
    (talk.sample, 9),
    (lists.sample, 14),
    (talk.unknown, 6),
    (talk.story, 3),
)


def vary(rng: Random, turn: Turn) -> str:
    """The user's words with the small carelessness of real prompts: case, missing full stop, a polite word."""
    text = turn.user
    if turn.literal:
        return text
    roll = rng.random()
    if roll < 0.10:
        text = text[0].lower() + text[1:]
    elif roll < 0.16:
        text = text.lower()
    elif roll < 0.18:
        text = text.upper()
    if rng.random() < 0.10:
        text = text.rstrip("?.!") or text
    roll = rng.random()
    if roll < 0.03:
        text = rng.choice(("Please: ", "Hey, ", "Hi! ", "Hello! ", "OK. ", "Now, ", "And now: ", "Question: ")) + text
    elif roll < 0.05:
        text += rng.choice((" Please.", " Thanks!", " please", " Thank you!", " Be brief.", " Answer briefly."))
    elif roll < 0.06:
        text = " ".join(rng.choices(talk.SENTENCES, k=rng.randint(1, 6))) + rng.choice((" ", "\n", "\n\n")) + text
    elif roll < 0.08:
        text = rng.choice((" ", "")) + text + rng.choice((" ", "\n"))
    return text


def conversation(rng: Random, turns: int) -> list[tuple[str, str]]:
    """`turns` exchanges as (role, text) messages, perhaps after a system message."""
    messages: list[tuple[str, str]] = []
    called = None
    if rng.random() < (0.2 if turns < 5 else 0.5):
        text = talk.system(rng)
        if rng.random() < 0.12:
            called = talk.named(rng)
            texts = (f"Your name is {called}. {text}", f"{text} You are called {called}.", f"Your name is {called}.")
            text = rng.choice(texts)
        messages.append(("system", text))
    name: str | None = None
    last: Turn | None = None
    for _ in range(turns):
        turn = None
        roll = rng.random()
        if roll < 0.03:
            name = name if name and rng.random() < 0.5 else talk.named(rng)
            turn = talk.tell_name(rng, name)
        elif roll < 0.045 or (name and roll < 0.10):
            turn = talk.ask_name(rng, name)
        elif last is not None and roll > 0.70:
            turn = _refer_back(rng, last, messages)
        elif called and roll > 0.5:
            turn = Turn(rng.choice(("Who are you?", "What is your name?", "What's your name?", "What are you called?")),
                        f"I am {called}, a very small language model.")  # fmt: skip
        if turn is None:
            turn = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0](rng)
            if called and turn.answer.startswith("I am Echelon's"):
                continue
        messages += [("user", vary(rng, turn)), ("assistant", turn.answer)]
        last = turn
    return messages


def _refer_back(rng: Random, last: Turn, messages: list[tuple[str, str]]) -> Turn | None:
    """A turn that only makes sense after `last`, or None."""
    if rng.random() < 0.12:
        ask = rng.choice(("Say that again.", "Can you repeat that?", "Again, please.", "What did you say?"))
        return Turn(ask, last.answer, result=last.result, topic=last.topic)
    if rng.random() < 0.08:
        ask = rng.choice(("What did I ask?", "What did I say?", "What was my last message?"))
        return Turn(ask, f"You said: {messages[-2][1].strip()}")
    if last.result is not None:
        return arithmetic.follow_up(rng, last.result)
    return facts.follow_up(rng, last.topic) if last.topic else None


def render(messages: list[tuple[str, str]]) -> str:
    """The text of a conversation with its special tokens, equal to what the chat template gives."""
    role = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    return BEGIN + "".join(f"{role[who]}{text}{END}" for who, text in messages)


def document(rng: Random) -> str:
    """Text without roles, for plain completion (`The capital of France is` ...), ending with the end token."""
    kind = rng.random()
    if kind < 0.4:
        text = facts.sample(rng).answer
    elif kind < 0.7:
        text = " ".join(arithmetic.sample(rng).answer for _ in range(rng.randint(1, 4)))
    elif kind < 0.8:
        text = talk.story(rng).answer
    elif kind < 0.9:
        text = lists.sample(rng).answer
    else:
        text = " ".join(facts.sample(rng).answer for _ in range(rng.randint(2, 6)))
    return (BEGIN if rng.random() < 0.3 else "") + text + END


def sample(rng: Random) -> str:
    """One training text: 62 % single turns, 27 % of 2-4 turns, the rest longer ones and plain documents."""
    roll = rng.random()
    if roll < 0.04:
        return document(rng)
    if roll < 0.66:
        turns = 1
    elif roll < 0.93:
        turns = rng.randint(2, 4)
    elif roll < 0.98:
        turns = rng.randint(5, 14)
    else:
        turns = int(2 ** rng.uniform(4, 6))
    return render(conversation(rng, turns) or [("user", "Hello!"), ("assistant", "Hello! How can I help you?")])


def drill(rng: Random) -> str:
    """One task of repeating or spelling by itself."""
    turn = rng.choice((lists.repeat, lists.repeat, lists.spell))(rng)
    return render([("user", turn.user), ("assistant", turn.answer)])


def shard(seed: int, index: int, count: int, drills: float = 0.0) -> list[str]:
    """`count` training texts, a share of `drills` of them drills; the same for the same arguments."""
    rng = Random(f"{seed}/{index}")
    return [drill(rng) if drills and rng.random() < drills else sample(rng) for _ in range(count)]


_SUM = re.compile(r"(?<!\d)(\d{1,2}) ([+-]) (\d{1,2}) = ")


def leaked(text: str) -> list[str]:
    """Held-out sums that occur in `text`: empty for every training text."""
    return [m.group(0) for m in _SUM.finditer(text)
            if arithmetic.pair_is_held_out(m.group(2), int(m.group(1)), int(m.group(3)))]  # fmt: skip
